"""Measurements of this machine, next to those of other libraries."""
