"""Detectors, one per file; `jaxclip.features.detect` makes them by name."""
