"""Processes, mesh, compilers, files, progress and the metrics log."""
