"""Ids of products: storable, and unique in a catalogue.

An id is the catalogue's own string, exactly: leading zeros, case, spaces, slashes and backslashes are kept. A reader
says which rows make one product; it neither numbers ids nor drops a product because its id repeats.
"""

import re
from collections.abc import Sequence

UNSTORABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that a text must not have: NUL, and lone surrogates, which no UTF-8 text can contain.

In file names and texts that are not UTF-8, other bytes are surrogates (`surrogateescape`), and JSON may have any.
"""
REPEATED = "id of another product, made unique by a number"
"""Kind of the oddity of a product whose id `unique` numbered."""


def clean(text: str) -> str:
    """Returns the text with every character that cannot be stored (see UNSTORABLE) replaced by U+FFFD."""
    return UNSTORABLE.sub("\ufffd", text)


def unique(ids: Sequence[str]) -> list[str]:
    """Returns the ids with every repeated one numbered, in time proportional to their number.

    The first product of an id keeps it. Later ones get ID-2, ID-3 and so on, except for numbers that make an id that
    some product of the catalogue has, before or after it. So an id that occurs once never changes.

    Args:
      ids: the id of each product, in the catalogue's order.
    """
    numbers = dict.fromkeys(ids, 0)  # id -> the last number given to it
    result = []
    for id_ in ids:
        name, numbers[id_] = id_, numbers[id_] + 1
        if numbers[id_] > 1:
            # No other id gives this name: only its last number can be taken off it.
            while (name := f"{id_}-{numbers[id_]}") in numbers:
                numbers[id_] += 1
        result.append(name)
    return result
