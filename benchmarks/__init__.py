"""How one can know: speed, the GPU, faults and access, each by one command. Nothing of the product imports this."""
