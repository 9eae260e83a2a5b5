"""What is done with a run's adapter: pictures, the agreement of its files, its card, its publication."""
