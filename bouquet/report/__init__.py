"""One HTML file about a run, and the words and charts that it is made of."""
