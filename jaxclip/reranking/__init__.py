"""Re-rankers: their data, networks, training and evaluation."""
