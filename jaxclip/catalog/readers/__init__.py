"""Readers of raw catalogues, one file for each layout, by the name that `--config.data.reader` takes."""

from jaxclip.catalog.product import Reader
from jaxclip.catalog.readers import fashion_product_images, folder, table

READERS: dict[str, Reader] = {
    "drawn": fashion_product_images.read,
    "fashion_product_images": fashion_product_images.read,
    "folder": folder.read,
    "table": table.read,
}
