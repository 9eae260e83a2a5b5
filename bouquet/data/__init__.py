"""Photos for sites: a data set divided among them."""
