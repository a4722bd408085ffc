"""Plan a training run: python -m jaxclip.plan --config=configs/pretrain_large_batch.py:vit_l_14 --topology=v5e:16x16

Compiles the training step for TPUs or GPUs that this machine does not have, with their own compilers (pip install
jaxclip[plan] for TPUs, jaxclip[plan_gpu] for GPUs). Prints memory, FLOPs and traffic per device, and the step time that
they allow. Nothing is trained.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from jaxclip import cli
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.runtime import startup

if TYPE_CHECKING:
    from jaxclip.planning.fit import Plan

TOPOLOGY = flags.DEFINE_string(
    "topology", None, "KIND:SHAPE of a slice of TPUs, such as v5e:16x16, or KIND:COUNT of GPUs, such as h100:64"
)
COMPARE = flags.DEFINE_list(
    "compare", [], "more topologies, or meshes DATAxFSDPxTENSOR of --topology, to show side by side"
)
MAX_BATCH = flags.DEFINE_bool(
    "max_batch", False, "find nearly the largest global batch that fits in memory, by compiling several"
)
OPERATIONS = flags.DEFINE_integer("operations", 0, "also list so many operations that move the most bytes (up to 20)")
JSON = flags.DEFINE_string("json", None, "file to write the plans to")

ROWS: Sequence[tuple[str, Callable[["Plan"], str]]] = (
    ("devices", lambda p: f"{p.devices:,}"),
    ("mesh", lambda p: " x ".join(map(str, p.mesh))),
    ("global batch", lambda p: f"{p.batch_size:,}"),
    ("parameters", lambda p: _gib(p.parameters)),
    ("optimizer", lambda p: _gib(p.optimizer)),
    ("batch", lambda p: _gib(p.batch)),
    ("temporaries", lambda p: _gib(p.temporaries)),
    ("total / memory", lambda p: f"{_gib(p.needed)} / {_gib(p.memory)}"),
    ("fits", lambda p: "yes" if p.fits else "NO"),
    ("model FLOPs", lambda p: f"{p.model_flops / 1e12:,.3g} T"),
    ("FLOPs", lambda p: f"{p.flops / 1e12:,.3g} T"),
    ("memory traffic", lambda p: _gib(p.traffic)),
    ("all-reduce", lambda p: _sent(p, "all-reduce")),
    ("all-gather", lambda p: _sent(p, "all-gather")),
    ("reduce-scatter", lambda p: _sent(p, "reduce-scatter")),
    ("all-to-all", lambda p: _sent(p, "all-to-all")),
    ("permute", lambda p: _sent(p, "collective-permute")),
    ("compute time", lambda p: _ms(p.seconds["compute"])),
    ("memory time", lambda p: _ms(p.seconds["memory"])),
    ("network time", lambda p: _ms(p.seconds["network"])),
    ("  not overlapped", lambda p: _ms(p.exposed)),
    ("roofline step", lambda p: f"{_ms(p.step_seconds)} ({p.bound})"),
    ("MFU allowed", lambda p: f"{p.mfu:.0%}"),
    ("pairs/s, total", lambda p: f"{p.pairs_per_second:,.0f}"),
)
FROM_COMPILER = ROWS[[name for name, _ in ROWS].index("FLOPs") :]
"""Rows that are unknown for a program that does not fit into memory, which its compiler refuses."""


def main(overrides: dict[str, str]) -> None:
    """Plans a training run according to the flags."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # the accelerators of this machine are not needed
    configuration = cli.from_file({"data.prepared": "(not read)", **overrides})
    if configuration.task == "rerank":
        raise UserError(
            "config.task = 'rerank' cannot be planned: set --config to the configuration of the re-ranker's towers"
        )
    if not TOPOLOGY.value:
        raise UserError("--topology is missing: give KIND:SHAPE, such as --topology=v5e:16x16")
    with startup.quiet_imports():
        from jaxclip.planning import fit

    plans = []
    for topology, config in [
        (TOPOLOGY.value, configuration),
        *(_variant(item, configuration) for item in COMPARE.value),
    ]:
        if MAX_BATCH.value:
            plans.append(fit.largest_batch(config, topology, say=cli.say))
        else:
            cli.say(f"compiling for {topology}")
            plans.append(fit.plan(config, topology))
    print(table(plans))
    for plan in plans if OPERATIONS.value else ():
        print(f"\n{operations(plan, OPERATIONS.value)}")
    if JSON.value:
        derived = ("fits", "step_seconds", "bound")
        rows = [{**dataclasses.asdict(p), **{name: getattr(p, name) for name in derived}} for p in plans]
        Path(JSON.value).write_text(json.dumps(rows, indent=2) + "\n")
        print(f"\n{'plans':18}{JSON.value}")


def _variant(item: str, config: Config) -> tuple[str, Config]:
    """Returns the topology and the configuration for an item of --compare, a topology or a mesh."""
    if ":" in item:
        return item, config
    sizes = item.split("x")
    if len(sizes) != 3 or not all(size.isdigit() for size in sizes):
        raise UserError(f"--compare={item} is neither a topology (v6e:16x16) nor a mesh (DATAxFSDPxTENSOR, 16x16x1)")
    data, fsdp, tensor = map(int, sizes)
    return TOPOLOGY.value, replace(config, mesh=replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor))


def table(plans: Sequence["Plan"]) -> str:
    """Returns a table with one column per plan; values are per device and step, except the batch and the last row."""
    names = [f"{plan.slices} x {plan.topology}" if plan.slices > 1 else plan.topology for plan in plans]
    lines = [f"{'per device':18}" + "".join(f"{name:>24}" for name in names)]
    for row in ROWS:
        shown = ("unknown" if plan.flops is None and row in FROM_COMPILER else row[1](plan) for plan in plans)
        lines.append(f"{row[0]:18}" + "".join(f"{value:>24}" for value in shown))
    return "\n".join(lines)


def operations(plan: "Plan", count: int) -> str:
    """Returns a list of the operations of a plan that move the most bytes, with their runs per step and bytes."""
    lines = [f"{plan.topology}: the operations that move the most bytes"]
    for operation in plan.operations[:count]:
        lines.append(
            f"{_gib(operation.bytes):>14} {operation.times:>8,.0f} x {operation.kind:14} {operation.name[-80:]}"
        )
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"


def _sent(plan: "Plan", collective: str) -> str:
    """Returns the bytes that a collective sends, and how many of them leave the slice or the machine."""
    between = plan.between.get(collective)
    return _gib(plan.sent.get(collective, 0)) + (f" ({_gib(between)} out)" if between else "")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


if __name__ == "__main__":
    cli.define_config_file()
    cli.run(main, __doc__)
