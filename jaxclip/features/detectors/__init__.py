"""Detectors, one per file, and what they share; `jaxclip.features.detect` makes them by name."""
