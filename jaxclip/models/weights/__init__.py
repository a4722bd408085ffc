"""Loads and saves weights in the layouts of other libraries; each layout is a table of their names and ours."""
