"""Exact ranks and retrieval metrics, over arrays alone."""
