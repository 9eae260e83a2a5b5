"""A site's half of the app: it sees photos, and never imports the hub's."""
