"""Readers of raw catalogues, one file per layout. The keys of READERS are the values of `--config.data.reader`."""

from jaxclip.catalog.product import Reader
from jaxclip.catalog.readers import (
    amazon_reviews,
    coco_captions,
    deepfashion_inshop,
    deepfashion_multimodal,
    digikala,
    fashion_gen,
    fashion_product_images,
    flickr30k,
    folder,
    table,
    tfds,
    webdataset,
)

READERS: dict[str, Reader] = {
    "amazon_reviews": amazon_reviews.read,
    "coco_captions": coco_captions.read,
    "deepfashion_inshop": deepfashion_inshop.read,
    "deepfashion_multimodal": deepfashion_multimodal.read,
    "digikala": digikala.read,
    "drawn": fashion_product_images.read,
    "fashion_gen": fashion_gen.read,
    "fashion_product_images": fashion_product_images.read,
    "flickr30k": flickr30k.read,
    "folder": folder.read,
    "table": table.read,
    "tfds": tfds.read,
    "webdataset": webdataset.read,
}
