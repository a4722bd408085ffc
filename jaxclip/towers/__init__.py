"""The two towers: building, restoring, running and exporting them, and their checkpoints."""
