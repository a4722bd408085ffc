"""A drawn catalogue: products with known boxes, parts and colours, in the layout of Fashion Product Images."""

from jaxclip.catalog.drawn.catalogue import draw_catalogue

__all__ = ["draw_catalogue"]
