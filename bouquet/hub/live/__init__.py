"""The hub's page, on its own host's loopback."""
