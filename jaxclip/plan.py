"""Plan a training run: python -m jaxclip.plan --config=configs/pretrain_large_batch.py:vit_l_14 --topology=v5e:16x16

Compiles the training step for TPUs that this machine does not have (pip install jaxclip[plan]). Prints the memory,
FLOPs and traffic per device and the step time of the roofline model. For GPUs (h100:64) these are estimates from the
same program. Nothing is trained.
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

TOPOLOGY = flags.DEFINE_string("topology", None, "KIND:SHAPE, such as v5e:16x16, v5p:4x4x4 or h100:64 (an estimate)")
COMPARE = flags.DEFINE_list(
    "compare", [], "more topologies, or meshes DATAxFSDPxTENSOR of --topology, to show side by side"
)
MAX_BATCH = flags.DEFINE_bool(
    "max_batch", False, "find nearly the largest global batch that fits in memory, by compiling several"
)
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
    ("FLOPs", lambda p: f"{p.flops / 1e12:,.3g} T"),
    ("memory traffic", lambda p: _gib(p.traffic)),
    ("all-reduce", lambda p: _gib(p.sent.get("all-reduce", 0))),
    ("all-gather", lambda p: _gib(p.sent.get("all-gather", 0))),
    ("reduce-scatter", lambda p: _gib(p.sent.get("reduce-scatter", 0))),
    ("other collectives", lambda p: _gib(sum(p.sent.get(k, 0) for k in ("all-to-all", "collective-permute")))),
    ("compute time", lambda p: _ms(p.seconds["compute"])),
    ("memory time", lambda p: _ms(p.seconds["memory"])),
    ("network time", lambda p: _ms(p.seconds["network"])),
    ("roofline step", lambda p: _ms(p.step_seconds)),
    ("MFU of roofline", lambda p: f"{p.mfu:.0%}"),
    ("pairs/s, total", lambda p: f"{p.pairs_per_second:,.0f}"),
)


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
    if JSON.value:
        rows = [{**dataclasses.asdict(p), "fits": p.fits, "step_seconds": p.step_seconds} for p in plans]
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
    lines = [f"{'per device':18}" + "".join(f"{plan.topology:>24}" for plan in plans)]
    lines += [f"{name:18}" + "".join(f"{show(plan):>24}" for plan in plans) for name, show in ROWS]
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


if __name__ == "__main__":
    cli.define_config_file()
    cli.run(main, __doc__)
