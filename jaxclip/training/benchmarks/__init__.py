"""What `python -m jaxclip.bench` measures. It is in this room because it may import all that is worth measuring."""
