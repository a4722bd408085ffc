"""The training loop, step, optimizer, recipe and run."""
