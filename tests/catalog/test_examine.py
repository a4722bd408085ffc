"""Products are examined in blocks that fit into memory, and results keep their order."""

import os
from dataclasses import dataclass

import pytest
from PIL import Image

from jaxclip.catalog.examine import BLOCK, BLOCK_BYTES, blocks, examine
from jaxclip.catalog.pictures import MAX_PIXELS, Picture
from jaxclip.catalog.product import Product


def test_a_block_is_limited_by_products_and_by_bytes(tmp_path):
    large = tmp_path / "large.jpg"
    large.touch()
    os.truncate(large, BLOCK_BYTES // 3)  # a sparse file: nothing is read
    small = [Product(str(number), tmp_path / "missing.jpg", ()) for number in range(BLOCK + 1)]
    assert [len(block) for block in blocks(small)] == [BLOCK, 1]
    mixed = [Product(str(number), large, ()) for number in range(5)] + small
    split = list(blocks(mixed))
    assert [len(block) for block in split] == [4, BLOCK, 2]
    assert sum(split, []) == mixed and not list(blocks([]))


@dataclass(frozen=True)
class Inside:
    """A picture inside another file, which must not be read."""

    size: int

    def read(self):
        raise AssertionError("read")


def test_pictures_inside_other_files_are_measured_without_being_read():
    products = [Product(str(number), Inside(BLOCK_BYTES // 3), ()) for number in range(6)]
    assert [len(block) for block in blocks(products)] == [4, 2]
    (result,) = examine([Product("large", Inside(10**9), ())], None, 1)
    assert result.picture == f"image file over {8 * MAX_PIXELS + 2**20} bytes"


@pytest.mark.parametrize("workers", (1, 3))
def test_results_keep_their_order_and_have_a_picture_or_a_reason(tmp_path, workers):
    Image.new("RGB", (4, 6), "red").save(tmp_path / "there.png")
    products = [Product(str(number), tmp_path / ("there.png" if number % 3 else "no.png"), ()) for number in range(300)]
    results = list(examine(products, None, workers))
    assert [result.product for result in results] == products
    for number, result in enumerate(results):
        assert isinstance(result.picture, Picture) if number % 3 else result.picture == "image missing"
