"""Measures a GPU or TPU within a number of minutes: products, training steps, attention, gradients, losses, ranks.

PARTS lists what is measured, in order. Each part runs in a process of its own with a time limit, so that a part that
fails, hangs or runs out of memory is a row with "error" and the others still run. On a CPU, where only the command
itself can be tested, the parts have toy sizes.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxclip.benchmarks import device_parts, device_steps, limited
from jaxclip.benchmarks.limited import Row
from jaxclip.runtime import startup
from jaxclip.runtime.progress import bar

FLAGS = {
    "minutes": (8, "length of the whole run; parts that do not fit are left out"),
    "patience": (1, "factor of the parts' time limits, for a slow or busy machine"),
    "json": ("", "file to write the results to, after every part; the profiler's trace goes into the same folder"),
}
LEAST = 15.0
"""Seconds; a part is left out if less of the run remains, because it would hardly start."""


@dataclass(frozen=True)
class Part:
    """One process of the benchmark.

    Attributes:
      name: unique name, which every row of the part holds as "part".
      function: yields the rows; a function of a module.
      limit: seconds after which the process is killed.
      sizes: arguments of the function on GPUs and TPUs.
      toy: arguments that replace some of `sizes` on CPUs.
      archive: extension of a file that the function also writes, next to the JSON file; its argument `archive` is the
        path.
    """

    name: str
    function: Callable[..., Iterator[Row]]
    limit: float
    sizes: Row
    toy: Row = field(default_factory=dict)
    archive: str = ""


TOY_STEP = {"preset": "tiny", "pairs": 8, "dtype": "float32"}  # compiles twice as fast as bfloat16


def _step(preset: str, pairs: int, **options: str) -> Part:
    """Returns the part that measures the training step of a preset."""
    name = ", ".join([f"step of {preset}", f"{pairs:,} pairs", *(f"{key} {value}" for key, value in options.items())])
    sizes = {"preset": preset, "pairs": pairs, "steps": 10, "dtype": "bfloat16", **options}
    return Part(name, device_steps.step, 60, sizes, TOY_STEP | {"steps": 3, "cached": True})


# Tokens, heads, causal or not, and examples of: the image tower of vit_b_32, its text tower, and the image towers of
# vit_b_16 and vit_l_14, in the batches of their steps.
ATTENTION = [(50, 12, False, 4096), (77, 8, True, 4096), (197, 12, False, 2048), (257, 16, False, 1024)]
TOY_ATTENTION = [(tokens, 2, causal, 2) for tokens, _, causal, _ in ATTENTION]

PARTS = (
    Part("machine", device_parts.machine, 40, {"matrix": 8192, "copied": 2**29}, {"matrix": 256, "copied": 2**16}),
    _step("vit_b_32", 4096),
    _step("vit_b_32", 8192),
    _step("vit_b_16", 2048),
    _step("vit_l_14", 1024),
    Part("attention", device_parts.attention, 60, {"shapes": ATTENTION}, {"shapes": TOY_ATTENTION}),
    Part(
        "token embedding gradient",
        device_parts.token_embedding,
        40,
        {"examples": 4096, "length": 77, "vocabulary": 49408, "width": 512},
        {"examples": 8, "length": 32, "vocabulary": 512, "width": 16},
    ),
    Part(
        "losses on device and CPU", device_steps.losses, 60, {"preset": "tiny", "pairs": 32, "steps": 20}, {"pairs": 8}
    ),
    _step("vit_b_32", 4096, attention="xla"),  # the first step part has the fused one, and remat none
    _step("vit_b_32", 4096, remat="qkv,mixed,attended,hidden"),
    _step("vit_b_32", 4096, remat="full"),
    _step("vit_b_32", 4096, execution="scan"),  # the first step part unrolls its layers on GPUs
    Part(
        "bias gradient", device_parts.bias_gradient, 40, {"rows": 4096 * 50, "width": 3072}, {"rows": 512, "width": 32}
    ),
    Part(
        "InfoNCE",
        device_parts.loss,
        60,
        {"pairs": 32768, "dimension": 512, "tiles": [1024, 2048, 4096, 8192], "products": ["float32", "bfloat16"]},
        {"pairs": 64, "dimension": 16, "tiles": [8, 16, 32, 64]},
    ),
    Part(
        "ranks",
        device_parts.ranks,
        60,
        {"items": 41446, "dimension": 512, "top": 20, "products": ["float32", "bfloat16_3x", "bfloat16"]},
        {"items": 200, "dimension": 16},
    ),
    Part(
        "trace",
        device_steps.trace,
        60,
        {"preset": "vit_b_32", "pairs": 1024, "steps": 3, "dtype": "bfloat16"},
        TOY_STEP,
        archive="trace.tar.gz",
    ),
)


def measure(*, minutes: float, json: str = "", patience: float = 1, parts: Sequence[Part] = PARTS) -> Iterator[Row]:
    """Yields the rows of the parts, in order and as they come, and ends after `minutes`.

    Every row holds the name of its "part". A row holds either figures, or "error": one line that says what failed, or
    "left_out": why the part was not started. A part's time limit is shortened to what remains of the run.

    Args:
      minutes: length of the run.
      json: path of the JSON file; parts write their archives to its folder, and are left out if it is empty.
      patience: the time limits are multiplied by this.
      parts: what is measured.
    """
    startup.set_variables()  # the parts inherit them
    end = time.monotonic() + 60 * minutes
    progress = bar(parts, desc="measuring", unit="part", mininterval=0)
    for part in progress:
        remaining = end - time.monotonic()
        limit = min(patience * part.limit, remaining)
        if part.archive and not json:
            yield {
                "part": part.name,
                "left_out": f"it writes {part.archive} to the folder of the JSON file: give --json",
            }
        elif remaining < LEAST:
            reason = f"the {minutes:g} minutes of the run were over: give more with --minutes"
            yield {"part": part.name, "left_out": reason}
        else:
            progress.write(f"{part.name}: at most {limit:.0f} s", file=sys.stderr)
            yield from ({"part": part.name, **row} for row in _rows(part, limit, json))


def _rows(part: Part, limit: float, json: str) -> Iterator[Row]:
    archive = {"archive": str(Path(json).with_suffix(f".{part.archive}"))} if part.archive else {}
    arguments = {"function": limited.name_of(part.function), "sizes": part.sizes | archive, "toy": part.toy}
    return limited.rows(limited.name_of(device_parts.run), arguments, limit)


def machine(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the description of the machine in the JSON file, from the first row; {} before it is there.

    The process that starts the parts must not ask JAX, which would take the device for itself.
    """
    versions = rows[0] if rows and "device" in rows[0] else {}
    return {name: str(versions[name]) for name in ("device", "devices", "host", "jax") if name in versions}


def table(rows: Sequence[Row]) -> str:
    """Returns the rows of `measure` as lines for the terminal, grouped by part."""
    lines = ["JAX found only CPUs: the sizes are toys, and the figures say nothing"] * (
        rows[0].get("platform") == "cpu"
    )
    for previous, row in zip([{}, *rows], rows, strict=False):
        if row["part"] != previous.get("part"):
            lines.append(row["part"])
        figures = (_figure(name, value) for name, value in row.items() if name != "part")
        lines.append("    " + ", ".join(figure for figure in figures if figure))
    return "\n".join(lines)


UNITS = {
    "seconds": [(1, "s"), (1e-3, "ms"), (1e-6, "µs")],
    "flops_per_second": [(1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")],
    "bytes_per_second": [(1e9, "GB/s"), (1e6, "MB/s")],
    "model_flops": [(1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")],
    "memory": [(2**30, "GiB"), (2**20, "MiB")],
    "temporaries": [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")],
    "bytes": [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")],
}
"""End of a field's name -> its units, largest first, with the value of one."""


def _figure(name: str, value: Any) -> str:
    """Returns "name value unit" of one field; "" if it has no value, or a list of figures that is too long to show."""
    if value is None or isinstance(value, list):
        return f"{name} {', '.join(map(str, value))}" if name == "left_out_files" and value else ""
    if name == "mfu":
        return f"mfu {value:.1%}"
    units = next((units for ending, units in UNITS.items() if name.endswith(ending)), None)
    if units is None or not isinstance(value, int | float):
        return f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}"
    size, unit = next(((size, unit) for size, unit in units if abs(value) >= size), units[-1])
    return f"{name.removesuffix('_per_second')} {value / size:,.4g} {unit}"
