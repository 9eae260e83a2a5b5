"""What only a GPU can show: the acceptance of a machine, and what was tried to make its loop cheaper."""
