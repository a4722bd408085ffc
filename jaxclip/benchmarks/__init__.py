"""Benchmarks of this package and other libraries on this machine."""
