"""Products are examined in blocks that memory can hold, and come out in the order in which they went in."""

import os
from dataclasses import dataclass

import pytest
from PIL import Image

from jaxclip.catalog.examine import BLOCK, BLOCK_BYTES, blocks, examine
from jaxclip.catalog.pictures import MAX_PIXELS, Picture
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


@dataclass(frozen=True)
class Inside:
    """A picture inside another file that must not be read."""

    size: int

    def read(self):
        raise AssertionError("read")


def test_pictures_inside_other_files_count_without_being_read():
    products = [Product(str(number), Inside(BLOCK_BYTES // 3), ()) for number in range(6)]
    assert [len(block) for block in blocks(products)] == [4, 2]
    (found,) = examine([Product("large", Inside(10**9), ())], None, 1)
    assert found.picture == f"image file over {8 * MAX_PIXELS + 2**20} bytes"


@pytest.mark.parametrize("workers", (1, 3))
def test_products_come_out_in_order_with_their_picture_or_the_reason_why_there_is_none(tmp_path, workers):
    Image.new("RGB", (4, 6), "red").save(tmp_path / "there.png")
    products = [Product(str(number), tmp_path / ("there.png" if number % 3 else "no.png"), ()) for number in range(300)]
    found = list(examine(products, None, workers))
    assert [each.product for each in found] == products
    for number, each in enumerate(found):
        assert isinstance(each.picture, Picture) if number % 3 else each.picture == "image missing"
