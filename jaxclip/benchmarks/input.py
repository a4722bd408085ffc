"""Speed of the input pipeline, from encoded pictures and captions to batches, compared with other loaders."""

import importlib.util
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxclip.benchmarks.timing import REPEATS, rounds
from jaxclip.benchmarks.workers import Worker
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.catalog.readers import fashion_product_images
from jaxclip.pipeline import text

FLAGS = {
    "size": (224, "side of the square pictures in a batch, pixels"),
    "source": (256, "side of the JPEGs, pixels"),
    "batches": (20, "timed batches of 64 pairs"),
    "repeats": (3, REPEATS),
}
OURS, ON_DEVICE = "jaxclip", "jaxclip, resize_on=device"
PEERS = {"Pillow in threads": (), "webdataset": ("webdataset", "torch"), "grain": ("grain",)}
"""Implementation -> the packages it needs in addition to this package's."""
PRODUCTS, BATCH, CONTEXT_LENGTH = 512, 64, 32
AREA = (0.6, 1.0)  # range of the share of the picture that a random crop covers, the default of config.Augmentation
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def measure(*, size: int, source: int, batches: int, repeats: int = 3) -> list[dict[str, Any]]:
    """Returns a row for each implementation.

    A row holds "seconds", the median time of `batches` batches of 64 pairs; "per_second", pairs per second; and
    "time_ratio", `seconds` divided by this package's.

    Each implementation decodes JPEGs of `source` x `source` pixels, takes a random crop, scales it to `size` x `size`
    with an antialiased bicubic filter, and encodes the caption with the same tokenizer, on all cores; ON_DEVICE leaves
    the scaling to the accelerator, whose time is not measured. Each runs in a separate process, in turns, and the first
    batch of each run is not timed. Implementations whose packages are not installed are left out.
    """
    with tempfile.TemporaryDirectory(prefix="jaxclip_input_") as name, ExitStack() as stack:
        folder = Path(name)
        _catalogue(folder, source)
        peers = [peer for peer, packages in PEERS.items() if all(map(importlib.util.find_spec, packages))]
        workers = [
            stack.enter_context(Worker(name, f"{__name__}:calls", name, folder, size, batches))
            for name in (OURS, ON_DEVICE, *peers)
        ]
        for worker in workers:
            worker.run("batches")
        seconds: dict[str, list[float]] = {}
        for _ in rounds(repeats):
            for worker in workers:
                seconds.setdefault(worker.name, []).append(worker.run("batches")[1])
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return [
        {
            "implementation": name,
            "size": size,
            "source": source,
            "cores": CPUS,
            "seconds": median,
            "per_second": batches * BATCH / median,
            "time_ratio": median / medians[OURS],
        }
        for name, median in medians.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of `measure` as a table for the terminal."""
    first = rows[0]
    lines = [
        f"JPEGs of {first['source']} pixels to {first['size']}, with captions, {first['cores']} cores",
        f"{'':28}{'pairs/s':>9}{'ratio':>7}",
    ]
    return "\n".join(lines + [f"{r['implementation']:28}{r['per_second']:9,.0f}{r['time_ratio']:7.2f}" for r in rows])


def calls(name: str, folder: Path, size: int, batches: int) -> dict[str, Callable[[], float]]:
    """Returns the only call of an implementation, "batches": takes `batches` batches and returns the seconds.

    A first batch is taken before the clock starts.
    """
    implementations = {
        OURS: ours,
        ON_DEVICE: partial(ours, resize_on="device"),
        "Pillow in threads": threads,
        "webdataset": webdataset,
        "grain": grain,
    }
    start_stream = implementations[name](folder, size, batches + 1)

    def take_batches() -> float:
        stream = start_stream()
        next(stream)
        start = time.perf_counter()
        for batch in islice(stream, batches):
            assert len(batch["image"]) == BATCH and batch["text"].shape == (BATCH, CONTEXT_LENGTH)
            assert ("extent" in batch) == (name == ON_DEVICE) and batch["image"].shape[1] >= size
        return time.perf_counter() - start

    return {"batches": take_batches}


def ours(
    folder: Path, size: int, batches: int, resize_on: str = "host"
) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
    """Returns a function that starts `training_batches` over a catalogue that it prepares, like the command `train`."""
    from jaxclip.catalog import library
    from jaxclip.catalog.builder import Source
    from jaxclip.config.schema import Augmentation, Config
    from jaxclip.pipeline.batches import training_batches
    from jaxclip.pipeline.preprocess import Preprocess
    from jaxclip.pipeline.records import Records
    from jaxclip.training import device_resize

    source = Source("fashion_product_images", folder / "raw", 0, 0, {}, None)
    silent = {"progress": lambda items, **_: items, "say": lambda line: None}
    records = Records(library.find_or_prepare(source, str(folder / "prepared"), drawn=(0, 0), **silent), "all")
    preprocess = Preprocess(size, "squash", (0.5,) * 3, (0.5,) * 3, "{name}", True, CONTEXT_LENGTH)
    config = Config(seed=0, batch_size=BATCH, augmentation=Augmentation(AREA, (0.8, 1.25)))
    canvas = device_resize.canvas_of(resize_on, preprocess, config.augmentation, records.largest_side)
    tokenizer = _tokenizer(folder)
    return lambda: training_batches(records, tokenizer, preprocess, config, steps=range(batches), canvas=canvas)


def threads(folder: Path, size: int, batches: int) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
    """Returns a function that starts a stream of batches from a pool of one thread per core.

    Each picture is one task, and the tasks of two batches are in the pool at a time.
    """
    pairs, tokenizer = _pairs(folder), _tokenizer(folder)

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

    shards, pairs = [], _pairs(folder)
    for shard in range(CPUS):
        shards.append(str(folder / f"{shard}.tar"))
        with tarfile.open(shards[-1], "w") as tar:
            for number in range(shard, len(pairs), CPUS):
                for extension, data in zip(("jpg", "txt"), (pairs[number][0], pairs[number][1].encode()), strict=True):
                    member = tarfile.TarInfo(f"{number}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    collate = _Collate(size, _tokenizer(folder))

    def stream() -> Iterator[dict[str, np.ndarray]]:
        dataset = wds.WebDataset(shards, shardshuffle=False, empty_check=False)
        dataset = dataset.repeat().shuffle(PRODUCTS // 4).to_tuple("jpg", "txt").batched(BATCH, collation_fn=collate)
        return iter(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=CPUS, prefetch_factor=2))

    return stream


def grain(folder: Path, size: int, batches: int) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
    """Returns a function that starts an endless iterator of grain; one thread per core decodes pictures from memory."""
    import grain as library

    pairs, tokenizer = _pairs(folder), _tokenizer(folder)

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


def _catalogue(folder: Path, source: int) -> None:
    """Draws a catalogue into folder/raw, with pictures of `source` x `source` pixels and camera-like noise."""
    raw, random = folder / "raw", np.random.default_rng(0)
    draw_catalogue(raw, PRODUCTS, 0)
    for path in sorted((raw / "images").iterdir()):
        picture = Image.open(path).convert("RGB").resize((source, source), Image.Resampling.BICUBIC)
        noisy = np.asarray(picture) + random.normal(0, 4, (source, source, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def _pairs(folder: Path) -> list[tuple[bytes, str]]:
    """Returns the encoded picture and the caption of every product."""
    products = fashion_product_images.read(folder / "raw", {})
    return [(product.image.read_bytes(), product.title.lower()) for product in products]


def _tokenizer(folder: Path) -> Any:
    return text.train_tokenizer([caption for _, caption in _pairs(folder)], 1024)


def _tokens(tokenizer: Any, texts: list[str]) -> np.ndarray:
    return text.encode(tokenizer, texts, CONTEXT_LENGTH)
