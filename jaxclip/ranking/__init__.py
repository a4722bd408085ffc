"""Exact ranks and retrieval metrics, as functions of arrays."""
