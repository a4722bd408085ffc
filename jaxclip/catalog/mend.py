"""Replaces characters that cannot be stored in the texts of products, for all readers."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from jaxclip.catalog.ids import UNSTORABLE, clean, unique
from jaxclip.catalog.product import Oddity, Product

BROKEN = "broken UTF-8"
"""Kind of the oddity of a text with bytes or code points that are not UTF-8."""
NUL = "NUL character"
"""Kind of the oddity of a text with a NUL."""


def rows(items: Iterable[Product | Oddity]) -> Iterator[Product | Oddity]:
    """Yields a reader's items with storable texts; an oddity of each kind that was mended follows its product."""
    for item in items:
        if isinstance(item, Oddity):
            yield replace(item, location=clean(item.location))
            continue
        product, kinds = mended(item)
        yield product
        for kind in kinds:
            yield Oddity(product.id, kind, dropped=False)


def mended(product: Product) -> tuple[Product, tuple[str, ...]]:
    """Returns the product with storable texts (see `ids.clean`), and the kinds of oddities that were mended.

    Captions that become equal are one caption. Names of attributes that become equal are numbered. A group keeps other
    groups apart: its characters are written as escapes. Pictures are unchanged, because a file's name needs its bytes.
    """
    texts = (product.id, product.group, product.category, *product.roles, *product.captions)
    found = set(UNSTORABLE.findall("\n".join((*texts, *product.attributes.keys(), *product.attributes.values()))))
    if not found:
        return product, ()
    names = unique([clean(name) for name in product.attributes])
    storable = replace(
        product,
        id=clean(product.id),
        captions=tuple(dict.fromkeys(map(clean, product.captions))),
        category=clean(product.category),
        attributes=dict(zip(names, map(clean, product.attributes.values()), strict=True)),
        group=UNSTORABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", product.group),
        roles=tuple(map(clean, product.roles)),
    )
    return storable, tuple(kind for kind, has in ((BROKEN, found - {"\0"}), (NUL, "\0" in found)) if has)
