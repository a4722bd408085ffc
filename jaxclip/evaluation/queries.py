"""The captions of a split as queries, and its products as the gallery."""

from dataclasses import dataclass

import numpy as np

from jaxclip.catalog.product import Product
from jaxclip.pipeline import text
from jaxclip.pipeline.records import Records
from jaxclip.runtime.progress import bar
from jaxclip.towers.towers import Towers


@dataclass(frozen=True)
class Queries:
    """The captions of a split, which are the queries, and its products, whose pictures are the gallery.

    Attributes:
      products: the G products, in the order of the records.
      product_groups: (G,) the group of each product; products of one group are relevant to the same queries.
      picture_owners: (P,) the product of each picture, ascending.
      captions: the Q captions, as `pipeline.text.caption` words them.
      caption_products: (Q,) the index into `products` of each caption's product.
    """

    products: list[Product]
    product_groups: np.ndarray
    picture_owners: np.ndarray
    captions: list[str]
    caption_products: np.ndarray


def read_queries(records: Records, towers: Towers) -> Queries:
    """Returns the products of a split and all their captions, worded by `pipeline.text.caption`."""
    products, product_groups, captions, caption_products = [], [], [], []
    for product, group in bar(records.products(), total=len(records), desc="reading captions", unit="product"):
        for caption in product.captions:
            captions.append(text.caption(caption, product.attributes, towers.preprocess))
            caption_products.append(len(products))
        products.append(product)
        product_groups.append(group)
    groups, owners = np.asarray(product_groups), np.asarray(caption_products)
    return Queries(products, groups, records.picture_owners, captions, owners)
