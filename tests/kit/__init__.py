"""What tests share: a tiny base model and its data, a federation in one process, a false hub, a driver's stand-in."""
