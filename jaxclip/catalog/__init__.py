"""Reads raw catalogues and turns them into prepared datasets."""
