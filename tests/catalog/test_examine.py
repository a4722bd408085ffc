"""Products are examined in blocks that fit into memory, and results keep their order."""

import os
from dataclasses import dataclass

import pytest
from PIL import Image

from jaxclip.catalog.examine import BLOCK, BLOCK_BYTES, REPEATED, blocks, examine
from jaxclip.catalog.pictures import MAX_PIXELS, Picture
from jaxclip.catalog.product import Product


def test_a_block_is_limited_by_products_and_by_bytes(tmp_path):
    large = tmp_path / "large.jpg"
    large.touch()
    os.truncate(large, BLOCK_BYTES // 3)  # a sparse file: nothing is read
    small = [Product(str(number), (tmp_path / "missing.jpg",), ()) for number in range(BLOCK + 1)]
    assert [len(block) for block in blocks(small)] == [BLOCK, 1]
    mixed = [Product(str(number), (large,), ()) for number in range(5)] + small
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
    products = [Product(str(number), (Inside(BLOCK_BYTES // 3),), ()) for number in range(6)]
    assert [len(block) for block in blocks(products)] == [4, 2]
    (result,) = examine([Product("large", (Inside(10**9),), ())], None, 1)
    assert not result.pictures and result.left_out[0][1] == f"image file over {8 * MAX_PIXELS + 2**20} bytes"


@pytest.mark.parametrize("workers", (1, 3))
def test_results_keep_their_order_and_have_a_picture_or_a_reason(tmp_path, workers):
    Image.new("RGB", (4, 6), "red").save(tmp_path / "there.png")
    there, missing = tmp_path / "there.png", tmp_path / "no.png"
    products = [Product(str(number), (there if number % 3 else missing,), ()) for number in range(300)]
    results = list(examine(products, None, workers))
    assert [result.product.id for result in results] == [product.id for product in products]
    for number, result in enumerate(results):
        if number % 3:
            assert isinstance(result.pictures[0], Picture) and not result.left_out
        else:
            assert not result.pictures and result.left_out == ((str(missing), "image missing"),)


def test_a_product_keeps_each_readable_picture_once_and_the_role_of_each(tmp_path):
    paths = [tmp_path / name for name in ("red.png", "no.png", "red.bmp", "blue.png", "a\0b.png")]
    for path, colour in zip(paths, ("red", "", "red", "blue"), strict=False):
        if colour:
            Image.new("RGB", (4, 6), colour).save(path)
    product = Product("1", tuple(paths), (), roles=("query", "query", "gallery", "gallery", ""))
    (result,) = examine([product], None, 1)
    assert result.product.pictures == (paths[0], paths[3]) and result.product.roles == ("query", "gallery")
    assert len(result.pictures) == 2
    reasons = ["image missing", REPEATED, "image missing"]
    assert [*result.left_out] == list(
        zip([str(paths[1]), str(paths[2]), str(paths[4]).replace("\0", "\ufffd")], reasons, strict=True)
    )
