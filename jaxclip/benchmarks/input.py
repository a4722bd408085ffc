"""Speed of the input pipeline, from encoded pictures and captions to batches, compared with other loaders."""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxclip.benchmarks.input_peers import (
    AREA,
    BATCH,
    CONTEXT_LENGTH,
    CPUS,
    PRODUCTS,
    grain,
    threads,
    tokenizer_of,
    webdataset,
)
from jaxclip.benchmarks.timing import REPEATS, rounds
from jaxclip.benchmarks.workers import Worker
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.pipeline import text

FLAGS = {
    "size": (224, "side of the square pictures in a batch, pixels"),
    "source": (256, "side of the JPEGs, pixels"),
    "batches": (20, "timed batches of 64 pairs"),
    "repeats": (3, REPEATS),
}
OURS, ON_DEVICE = "jaxclip", "jaxclip, resize_on=device"
AUGMENTED, BY_CAPTION = f"{ON_DEVICE}, captions augmented", f"{ON_DEVICE}, augmented, tokenized whole"
DECODING = "decoding of the JPEGs alone"
VARIANTS = {
    OURS: {},
    ON_DEVICE: {"resize_on": "device"},
    AUGMENTED: {"resize_on": "device", "captions": "augmented"},
    BY_CAPTION: {"resize_on": "device", "captions": "whole"},
}
TEXTS = {
    "captions, stored": "stored",
    "captions, augmented": "augmented",
    "captions, augmented, tokenized whole": "whole",
}
"""Rows of the captions alone -> how `ours` gets their tokens."""
PEERS = {"Pillow in threads": (), "webdataset": ("webdataset", "torch"), "grain": ("grain",)}
"""Implementation -> the packages it needs in addition to this package's."""
GPU_PAIRS, GPUS = 9000, 8  # pairs/s of ViT-B/32 that an H200 shall train, and GPUs of a host


def measure(*, size: int, source: int, batches: int, repeats: int = 3) -> list[dict[str, Any]]:
    """Returns a row for each implementation.

    A row holds "seconds", the median time of `batches` batches of 64 pairs; "per_second", pairs per second;
    "time_ratio", `seconds` divided by this package's; "per_core", pairs per second of processor time, the median; and
    "cores", the cores that feed a GPU which trains GPU_PAIRS pairs a second at that rate. The last two are None for
    webdataset, whose processes are not counted.

    Each implementation decodes JPEGs of `source` x `source` pixels, takes a random crop, scales it to `size` x `size`
    with an antialiased bicubic filter, and encodes the caption with the same tokenizer, on all cores; ON_DEVICE leaves
    the scaling to the accelerator, whose time is not measured. The variants that augment captions build them from the
    default template, of which they leave out attributes and words at random. DECODING only parses the records and
    decodes their pictures. The rows of TEXTS have only the captions' tokens, made by one thread that holds the
    interpreter lock. Each runs in a separate process, in turns, and the first batch of each run is not timed.
    Implementations whose packages are not installed are left out.
    """
    with tempfile.TemporaryDirectory(prefix="jaxclip_input_") as name, ExitStack() as stack:
        folder = Path(name)
        _catalogue(folder, source)
        peers = [peer for peer, packages in PEERS.items() if all(map(importlib.util.find_spec, packages))]
        workers = [
            stack.enter_context(Worker(name, f"{__name__}:calls", name, folder, size, batches))
            for name in (*VARIANTS, DECODING, *TEXTS, *peers)
        ]
        for worker in workers:
            worker.run("batches")
        measured: dict[str, list[tuple[float, float]]] = {}
        for _ in rounds(repeats):
            for worker in workers:
                measured.setdefault(worker.name, []).append(worker.run("batches")[1])
    medians = {name: np.median(values, axis=0).tolist() for name, values in measured.items()}
    return [
        {
            "implementation": name,
            "size": size,
            "source": source,
            "machine_cores": CPUS,
            "seconds": seconds,
            "per_second": batches * BATCH / seconds,
            "time_ratio": seconds / medians[OURS][0],
            "per_core": None if name == "webdataset" else batches * BATCH / used,
            "cores": None if name == "webdataset" else GPU_PAIRS * used / (batches * BATCH),
        }
        for name, (seconds, used) in medians.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of `measure` as a table for the terminal."""
    first = rows[0]
    lines = [
        f"JPEGs of {first['source']} pixels to {first['size']}, with captions, {first['machine_cores']} cores",
        f"{'':60}{'pairs/s':>10}{'ratio':>7}{'/s of a core':>14}{'cores':>7}",
    ]
    for row in rows:
        core = "" if row["per_core"] is None else f"{row['per_core']:14,.0f}{row['cores']:7.2f}"
        lines.append(f"{row['implementation']:60}{row['per_second']:10,.0f}{row['time_ratio']:7.2f}{core}")
    return "\n".join([*lines, *_needed(rows)])


def _needed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the lines that say what a host of GPUS GPUs needs."""
    cores = {row["implementation"]: row["cores"] for row in rows}
    stored, augmented, decoding_alone = (GPUS * cores[name] for name in (ON_DEVICE, AUGMENTED, DECODING))
    return [
        f"cores: those that feed a GPU which trains {GPU_PAIRS:,} pairs/s, the aim for ViT-B/32 on an H200.",
        f"A host of {GPUS} needs {stored:.0f}, or {augmented:.0f} if captions are augmented; decoding alone takes "
        f"{decoding_alone:.0f}.",
    ]


def calls(name: str, folder: Path, size: int, batches: int) -> dict[str, Callable[[], tuple[float, float]]]:
    """Returns the only call of an implementation, "batches".

    It takes `batches` batches and returns the seconds, and the seconds of processor time of this process. A first batch
    is taken before the clocks start.
    """
    implementations = {
        **{variant: partial(ours, **settings) for variant, settings in VARIANTS.items()},
        **{texts: partial(captions_alone, captions=captions) for texts, captions in TEXTS.items()},
        DECODING: decoding,
        "Pillow in threads": threads,
        "webdataset": webdataset,
        "grain": grain,
    }
    start_stream = implementations[name](folder, size, batches + 1)

    def take_batches() -> tuple[float, float]:
        stream = start_stream()
        next(stream)
        start, used = time.perf_counter(), time.process_time()
        for batch in islice(stream, batches):
            assert name == DECODING or batch["text"].shape == (BATCH, CONTEXT_LENGTH)
            assert name in (DECODING, *TEXTS) or len(batch["image"]) == BATCH and batch["image"].shape[1] >= size
            assert ("extent" in batch) == name.startswith(ON_DEVICE)
        return time.perf_counter() - start, time.process_time() - used

    return {"batches": take_batches}


def ours(
    folder: Path, size: int, batches: int, resize_on: str = "host", captions: str = "stored"
) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
    """Returns a function that starts `training_batches` over a catalogue that it prepares, like the command `train`.

    `captions`: "stored" tokens; "augmented", joined from the tokens of words; or augmented and tokenized as a "whole".
    """
    from jaxclip.pipeline.batches import training_batches
    from jaxclip.training import device_resize

    records, preprocess, config, tokens = _pipeline(folder, size, captions)
    side = device_resize.choose_canvas(resize_on, records, preprocess, config.augmentation).side
    return lambda: training_batches(records, tokens, preprocess, config, steps=range(batches), canvas=side)


def captions_alone(
    folder: Path, size: int, batches: int, captions: str
) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
    """Returns a function that starts a stream of the tokens alone, made as `ours` makes them."""
    records, preprocess, config, tokens = _pipeline(folder, size, captions)
    random = np.random.default_rng(0)
    names, counts, attributes = (list(part) for part in next(records.texts()))
    assert set(counts) == {1}
    draws = random.random((BATCH, text.MAX_DRAWS), np.float32)

    def stream() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(batches):
            numbers = random.integers(0, len(names), BATCH)
            if captions == "stored":
                yield {"text": tokens.read(numbers, np.zeros_like(numbers))}
            else:
                chosen = [names[number] for number in numbers], [attributes[number] for number in numbers]
                yield {"text": tokens(text.augmented_captions(*chosen, preprocess, config.augmentation, draws))}

    return stream


def decoding(folder: Path, size: int, batches: int) -> Callable[[], Iterator[dict[str, Any]]]:
    """Returns a function that starts a stream of empty batches, for which as many pictures are read and decoded."""
    from jaxclip.pipeline import images
    from jaxclip.runtime.tensorflow import tf

    records, *_ = _pipeline(folder, size, "stored")

    def decode(serialized: tf.Tensor) -> tf.Tensor:
        return tf.shape(images.decode(records.picture(records.parse(serialized), 0)[0]))

    def stream() -> Iterator[dict[str, Any]]:
        dataset = tf.data.Dataset.from_tensor_slices(records.read(np.arange(len(records))).tolist()).repeat()
        decoded = dataset.map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).batch(BATCH).prefetch(2)
        return ({} for _ in decoded.take(batches).as_numpy_iterator())

    return stream


def _pipeline(folder: Path, size: int, captions: str) -> tuple[Any, Any, Any, Any]:
    """Returns the records, the preprocessing, the configuration, and what gives the tokens; see `ours`."""
    from jaxclip.catalog import library
    from jaxclip.catalog.builder import Source
    from jaxclip.catalog.captions import DEFAULT_TEMPLATE
    from jaxclip.config.schema import Augmentation, Config
    from jaxclip.pipeline.preprocess import Preprocess
    from jaxclip.pipeline.records import Records
    from jaxclip.pipeline.tokens import find_or_store
    from jaxclip.pipeline.words import TokenizedByCaption, caption_tokenizer

    source = Source("fashion_product_images", folder / "raw", 0, 0, {}, None)
    silent = {"progress": lambda items, **_: items, "say": lambda line: None}
    prepared = library.find_or_prepare(source, str(folder / "prepared"), drawn=(0, 0), **silent)
    records, tokenizer = Records(prepared, "all"), tokenizer_of(folder)
    kept, template = (1.0, "{name}") if captions == "stored" else (0.8, DEFAULT_TEMPLATE)
    preprocess = Preprocess(size, "squash", (0.5,) * 3, (0.5,) * 3, template, True, CONTEXT_LENGTH)
    augmentation = Augmentation(AREA, (0.8, 1.25), keep_attributes=kept, keep_words=kept)
    tokens: Any = TokenizedByCaption(tokenizer, CONTEXT_LENGTH)
    if captions != "whole":
        tokens = caption_tokenizer(tokenizer, CONTEXT_LENGTH, [])
    if captions == "stored":
        tokens = find_or_store(prepared, records, tokenizer, preprocess, tokens, say=silent["say"])
    return records, preprocess, Config(seed=0, batch_size=BATCH, augmentation=augmentation), tokens


def _catalogue(folder: Path, source: int) -> None:
    """Draws a catalogue into folder/raw, with pictures of `source` x `source` pixels and camera-like noise."""
    raw, random = folder / "raw", np.random.default_rng(0)
    draw_catalogue(raw, PRODUCTS, 0)
    for path in sorted((raw / "images").iterdir()):
        picture = Image.open(path).convert("RGB").resize((source, source), Image.Resampling.BICUBIC)
        noisy = np.asarray(picture) + random.normal(0, 4, (source, source, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
