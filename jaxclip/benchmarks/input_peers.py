"""The peers of the input benchmark: loaders that decode, crop and scale with Pillow, and their catalogue."""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxclip.catalog.readers import fashion_product_images
from jaxclip.pipeline import text

PRODUCTS, BATCH, CONTEXT_LENGTH = 512, 64, 32
AREA = (0.6, 1.0)  # range of the share of the picture that a random crop covers, the default of config.Augmentation
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def threads(folder: Path, size: int, batches: int) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
    """Returns a function that starts a stream of batches from a pool of one thread per core.

    Each picture is one task, and the tasks of two batches are in the pool at a time.
    """
    pairs, tokenizer = pairs_of(folder), tokenizer_of(folder)

    def stream() -> Iterator[dict[str, np.ndarray]]:
        random = np.random.default_rng(0)
        with ThreadPoolExecutor(CPUS) as pool:

            def submit_batch() -> list:
                sample = [pairs[number] for number in random.integers(0, len(pairs), BATCH)]
                draws = random.uniform(size=(BATCH, 3))
                texts = pool.submit(_tokens, tokenizer, [caption for _, caption in sample])
                pictures = zip(sample, draws, strict=True)
                return [texts, *(pool.submit(crop_with_pillow, data, size, draw) for (data, _), draw in pictures)]

            pending = [submit_batch() for _ in range(2)]
            for number in range(batches):
                if number + 2 < batches:
                    pending.append(submit_batch())
                texts, *images = (task.result() for task in pending.pop(0))
                yield {"image": np.stack(images), "text": texts}

    return stream


def webdataset(folder: Path, size: int, batches: int) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
    """Returns a function that starts webdataset with one shard and one process of PyTorch's DataLoader per core."""
    import torch.utils.data
    import webdataset as wds

    shards, pairs = [], pairs_of(folder)
    for shard in range(CPUS):
        shards.append(str(folder / f"{shard}.tar"))
        with tarfile.open(shards[-1], "w") as tar:
            for number in range(shard, len(pairs), CPUS):
                for extension, data in zip(("jpg", "txt"), (pairs[number][0], pairs[number][1].encode()), strict=True):
                    member = tarfile.TarInfo(f"{number}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    collate = _Collate(size, tokenizer_of(folder))

    def stream() -> Iterator[dict[str, np.ndarray]]:
        dataset = wds.WebDataset(shards, shardshuffle=False, empty_check=False)
        dataset = dataset.repeat().shuffle(PRODUCTS // 4).to_tuple("jpg", "txt").batched(BATCH, collation_fn=collate)
        return iter(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=CPUS, prefetch_factor=2))

    return stream


def grain(folder: Path, size: int, batches: int) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
    """Returns a function that starts an endless iterator of grain; one thread per core decodes pictures from memory."""
    import grain as library

    pairs, tokenizer = pairs_of(folder), tokenizer_of(folder)

    def example(pair: tuple[bytes, str], random: np.random.Generator) -> dict[str, np.ndarray]:
        picture = crop_with_pillow(pair[0], size, random.uniform(size=3))
        return {"image": picture, "text": _tokens(tokenizer, [pair[1]])[0]}

    def stream() -> Iterator[dict[str, np.ndarray]]:
        dataset = library.MapDataset.source(pairs).seed(0).shuffle().repeat().random_map(example)
        return iter(dataset.to_iter_dataset(library.ReadOptions(num_threads=CPUS)).batch(BATCH))

    return stream


def crop_with_pillow(data: bytes, size: int, draws: np.ndarray) -> np.ndarray:
    """Returns a random crop of an encoded picture, (size, size, 3) uint8, scaled by Pillow.

    `draws` are three uniform numbers in [0, 1): for the area, the horizontal and the vertical position of the crop.
    """
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    share = np.sqrt(AREA[0] + (AREA[1] - AREA[0]) * draws[0])
    width, height = (round(share * side) for side in picture.size)
    left, top = int(draws[1] * (picture.width - width + 1)), int(draws[2] * (picture.height - height + 1))
    box = (left, top, left + width, top + height)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))


class _Collate:
    """Makes a batch of webdataset's pairs; a class, because the loader pickles it for its processes."""

    def __init__(self, size: int, tokenizer: Any):
        self.size, self.tokenizer, self.random = size, tokenizer, np.random.default_rng(0)

    def __call__(self, pairs: list[tuple[bytes, bytes]]) -> dict[str, np.ndarray]:
        pictures = [crop_with_pillow(data, self.size, self.random.uniform(size=3)) for data, _ in pairs]
        return {
            "image": np.stack(pictures),
            "text": _tokens(self.tokenizer, [caption.decode() for _, caption in pairs]),
        }


def pairs_of(folder: Path) -> list[tuple[bytes, str]]:
    """Returns the encoded picture and the caption of every product."""
    products = fashion_product_images.read(folder / "raw", {})
    return [(product.pictures[0].read_bytes(), product.title.lower()) for product in products]


def tokenizer_of(folder: Path) -> Any:
    """Returns a tokenizer trained on the captions."""
    return text.train_tokenizer([caption for _, caption in pairs_of(folder)], 1024)


def _tokens(tokenizer: Any, texts: list[str]) -> np.ndarray:
    return text.encode(tokenizer, texts, CONTEXT_LENGTH)
