"""Weights of other libraries in and out: tables of names, theirs <-> ours, one file per layout."""
