"""Plan a training run: python -m jaxclip.plan --config=configs/pretrain_large_batch.py:vit_l_14 --topology=v5e:16x16

Compiles the training step for TPUs or GPUs that this machine does not have, with the compilers of those devices (pip
install -e '.[plan]' for TPUs, '.[plan_gpu]' for GPUs), which takes minutes for a large step. Prints memory, FLOPs and
traffic per device, and the step time that they allow. Nothing is trained.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from absl import flags

from jaxclip import cli
from jaxclip import config as configs
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
OPERATIONS = flags.DEFINE_integer(
    "operations", 0, "also list so many operations that move the most bytes", lower_bound=0, upper_bound=20
)
JSON = flags.DEFINE_string("json", None, "file to write the plans to")


def main(overrides: dict[str, str]) -> None:
    """Plans a training run according to the flags."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # the accelerators of this machine are not needed
    configuration = _configuration(overrides)
    if not TOPOLOGY.value:
        raise UserError("--topology is missing: give KIND:SHAPE, such as --topology=v5e:16x16")
    if JSON.value and not Path(JSON.value).absolute().parent.is_dir():
        raise UserError(f"--json={JSON.value}: there is no such folder")
    with startup.quiet_imports():
        from jaxclip.planning import fit, tables

    variants = [(TOPOLOGY.value, configuration), *(_variant(item, configuration) for item in COMPARE.value)]
    for topology, config in variants:  # before minutes of compiling
        fit.check(config, topology)
    plans: list[fit.Plan] = []
    try:
        for topology, config in variants:
            if MAX_BATCH.value:
                plans.append(fit.largest_batch(config, topology, say=cli.say))
            else:
                cli.say(f"compiling for {topology}")
                plans.append(fit.plan(config, topology))
    finally:
        if plans:
            _show(plans, tables)


def _configuration(overrides: dict[str, str]) -> Config:
    """Returns the configuration of --config; raises UserError if it is that of a re-ranker."""
    if flags.FLAGS["config"].value:
        task = overrides.get("task", configs.read_file(flags.FLAGS["config"].value).get("task"))
        if task == "rerank":
            raise UserError(
                "config.task = 'rerank' cannot be planned: set --config to the configuration of the re-ranker's towers"
            )
    return cli.from_file({"data.prepared": "(not read)", **overrides})


def _variant(item: str, config: Config) -> tuple[str, Config]:
    """Returns the topology and the configuration for an item of --compare, a topology or a mesh."""
    if ":" in item:
        return item, config
    if not re.fullmatch(r"(-1|\d+)x(-1|\d+)x(-1|\d+)", item, re.ASCII):
        raise UserError(f"--compare={item} is neither a topology (v6e:16x16) nor a mesh (DATAxFSDPxTENSOR, 16x16x1)")
    data, fsdp, tensor = map(int, item.split("x"))
    return TOPOLOGY.value, replace(config, mesh=replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor))


def _show(plans: Sequence["Plan"], tables: ModuleType) -> None:
    """Prints the plans and writes them to --json."""
    print(tables.table(plans))
    for line in dict.fromkeys(line for plan in plans for line in plan.settings):
        print(line)
    for plan in plans if OPERATIONS.value else ():
        print(f"\n{tables.operations(plan, OPERATIONS.value)}")
    if JSON.value:
        derived = ("needed", "fits", "step_seconds", "bound")
        rows = [{**dataclasses.asdict(p), **{name: getattr(p, name) for name in derived}} for p in plans]
        Path(JSON.value).write_text(json.dumps(rows, indent=2) + "\n")
        print(f"\n{'plans':18}{JSON.value}")


if __name__ == "__main__":
    cli.define_config_file()
    cli.run(main, __doc__)
