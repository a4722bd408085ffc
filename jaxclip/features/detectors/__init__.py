"""Detectors, one file each; `jaxclip.features.detect` makes them by name."""
