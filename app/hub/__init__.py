"""The hub's half of the app: it sees adapters and numbers, and never imports a site's."""
