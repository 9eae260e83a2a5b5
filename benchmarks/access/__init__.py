"""What a stranger, a neighbour and a site can do to the hub, tried."""
