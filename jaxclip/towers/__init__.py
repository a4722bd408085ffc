"""The towers: made, restored, run and exported."""
