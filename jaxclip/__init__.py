"""Text-to-image product retrieval with CLIP in JAX, from a laptop to a TPU pod."""

__version__ = "0.1.0"
