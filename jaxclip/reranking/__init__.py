"""Re-rankers end to end: their data, networks, training and evaluation."""
