"""Retrieval evaluation: exact ranks, metrics with intervals, protocols, and the report."""
