"""Train towers or a re-ranker:

    python -m jaxclip.train --config=configs/quickstart.py [--workdir=W] [--config.a.b=value ...]

Started again with the same workdir, a run resumes from its newest checkpoint. SIGTERM and Ctrl-C save and stop a run.
Several processes form one run if SLURM, GKE or Cloud TPU starts them, or with --coordinator_address, --num_processes
and --process_id.
"""

import signal
import time
from pathlib import Path

from absl import flags

from jaxclip import cli, config
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.evaluation import tables
from jaxclip.runtime import startup

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; default: runs/NAME for configs/NAME.py")
PROFILE = flags.DEFINE_string(
    "profile_steps", None, "FIRST:LAST, the steps (both included) to trace for TensorBoard and Perfetto"
)
STOPPED = flags.DEFINE_integer(
    "stopped_status", 0, "exit status after SIGTERM, for schedulers that treat exit status 0 as finished"
)
MAY_CHANGE = (
    "checkpoint.",
    "evaluation.",
    "log_every",
    "mesh.",
    "data.path",
    "data.prepared",
    "data.queries",
    "data.resize_on",
    "data.workers",
    "first_stage",
)
"""Prefixes of the settings that may change when a run is resumed; for adapters also model.init_from."""


def main(overrides: dict[str, str]) -> int:
    """Trains according to the flags and returns the exit status."""
    cli.join_processes()
    settings = cli.from_file(overrides)
    workdir = Path(WORKDIR.value or Path("runs") / Path(flags.FLAGS["config"].value.partition(":")[0]).stem)
    _check_workdir(workdir, settings)
    with startup.quiet_imports():  # these imports take seconds, so the flags are checked first
        from jaxclip.reranking.run import train_reranker
        from jaxclip.runtime import distributed
        from jaxclip.training import profile
        from jaxclip.training.run import train_towers

    profiled = profile.parse_steps(PROFILE.value) if PROFILE.value else range(0)
    distributed.check_identical(
        "config", config.flat(settings), "Start all processes with the same --config and overrides"
    )
    started = time.perf_counter()
    if settings.rerank.ablation:
        return _ablate(settings, workdir)
    train = train_reranker if settings.task == "rerank" else train_towers
    outcome = train(settings, workdir, say=cli.say, profiled=profiled)
    if outcome.signal is not None:
        return _stopped(outcome.signal, f" at step {outcome.step}, saved")
    if outcome.zero_shot is not None:
        cli.show(f"\n{tables.before_and_after(outcome.zero_shot, outcome.metrics)}")
    cli.show(f"\n{tables.headline(outcome.metrics, outcome.raw)}\n")
    cli.show(f"{'workdir':10}{workdir}")
    for path in ("metrics.json", "report.html"):
        cli.show(f"{Path(path).stem:10}{outcome.folder / path}")
    cli.show(f"{'time':10}{(time.perf_counter() - started) / 60:.1f} min")
    return 0


def _ablate(settings: Config, workdir: Path) -> int:
    from jaxclip.reranking import ablation

    config.save_config(settings, workdir)
    stopped, result = ablation.run(settings, workdir, say=cli.say)
    if stopped is not None:
        return _stopped(stopped, "")
    cli.show(f"\n{ablation.table(result)}\n\n{'ablation':10}{workdir / ablation.FILENAME}")
    return 0


def _stopped(number: int, where: str) -> int:
    cli.show(f"stopped by {signal.Signals(number).name}{where}; the same command resumes from there")
    return STOPPED.value if number == signal.SIGTERM else 128 + number


def _check_workdir(workdir: Path, settings: Config) -> None:
    if not (workdir / "config.json").exists():
        return
    # The base of adapters may have moved; its checksum is compared when it is loaded.
    may_change = (*MAY_CHANGE, "model.init_from") if settings.task == "adapter" else MAY_CHANGE
    changed = [
        line for line in config.differences(config.load_config(workdir), settings) if not line.startswith(may_change)
    ]
    if changed:
        raise UserError(
            f"{workdir} was started with another configuration ({'; '.join(changed)}): "
            "use the old values or another --workdir"
        )


if __name__ == "__main__":
    cli.define_config_file()
    cli.define_processes()
    cli.run(main, __doc__)
