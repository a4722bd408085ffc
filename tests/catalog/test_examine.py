"""Products are examined in blocks that memory can hold, and come out in the order in which they went in."""

import os

import pytest
from PIL import Image

from jaxclip.catalog.examine import BLOCK, BLOCK_BYTES, blocks, examine
from jaxclip.catalog.pictures import Picture
from jaxclip.catalog.product import Product


def test_a_block_is_full_by_products_or_by_bytes(tmp_path):
    large = tmp_path / "large.jpg"
    large.touch()
    os.truncate(large, BLOCK_BYTES // 3)  # a sparse file: nothing is read
    small = [Product(str(number), tmp_path / "missing.jpg", ()) for number in range(BLOCK + 1)]
    assert [len(block) for block in blocks(small)] == [BLOCK, 1]
    mixed = [Product(str(number), large, ()) for number in range(5)] + small
    found = list(blocks(mixed))
    assert [len(block) for block in found] == [4, BLOCK, 2]
    assert sum(found, []) == mixed and not list(blocks([]))


@pytest.mark.parametrize("workers", (1, 3))
def test_products_come_out_in_order_with_their_picture_or_the_reason_why_there_is_none(tmp_path, workers):
    Image.new("RGB", (4, 6), "red").save(tmp_path / "there.png")
    products = [Product(str(number), tmp_path / ("there.png" if number % 3 else "no.png"), ()) for number in range(300)]
    found = list(examine(products, None, workers))
    assert [each.product for each in found] == products
    for number, each in enumerate(found):
        assert isinstance(each.picture, Picture) if number % 3 else each.picture == "image missing"
