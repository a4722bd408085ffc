"""Products, the readers of raw catalogues, and the prepared dataset they become."""
