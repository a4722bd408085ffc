"""Train towers or a re-ranker:

    python -m jaxclip.train --config=configs/quickstart.py [--workdir=W] [--config.a.b=value ...]

Started again with the same workdir, it goes on from the newest checkpoint. SIGTERM and Ctrl-C save and stop. Several
processes are one run where SLURM, GKE or Cloud TPU started them, or where each is told its place by --process_id.
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

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; default: runs/ and the name of the config file")
PROFILE = flags.DEFINE_string("profile_steps", None, "FIRST:LAST, steps to trace for TensorBoard and Perfetto")
STOPPED = flags.DEFINE_integer("stopped_status", 0, "exit status after SIGTERM, for schedulers that take 0 for done")
MAY_CHANGE = (
    "checkpoint.",
    "evaluation.",
    "log_every",
    "mesh.",
    "data.path",
    "data.prepared",
    "data.resize_on",
    "data.workers",
    "first_stage",
)


def main(overrides: dict[str, str]) -> int:
    """Trains as the flags say; returns the exit status."""
    cli.join_processes()
    wanted = cli.from_file(overrides)
    workdir = Path(WORKDIR.value or Path("runs") / Path(flags.FLAGS["config"].config_filename).stem)
    _check_workdir(workdir, wanted)
    with startup.quiet_imports():  # they take seconds: bad flags are told before
        from jaxclip.reranking import run as rerank
        from jaxclip.runtime import distributed
        from jaxclip.training import profile
        from jaxclip.training.run import train

    profiled = profile.parse_steps(PROFILE.value) if PROFILE.value else range(0)
    distributed.check_identical("config", config.flat(wanted), "Start all with the same --config and overrides")
    started = time.perf_counter()
    if wanted.rerank.ablation:
        return _ablate(wanted, workdir)
    outcome = (rerank.train if wanted.task == "rerank" else train)(
        wanted,
        workdir,
        save_config=lambda: config.save_config(wanted, workdir),
        load_config=config.load_config,
        fingerprint=config.fingerprint(wanted),
        say=cli.say,
        profiled=profiled,
    )
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


def _ablate(wanted: Config, workdir: Path) -> int:
    from jaxclip.reranking import ablation

    config.save_config(wanted, workdir)
    stopped, result = ablation.run(
        wanted,
        workdir,
        load_config=config.load_config,
        save_config=lambda workdir, wanted: config.save_config(wanted, workdir),
        fingerprint=config.fingerprint,
        say=cli.say,
    )
    if stopped is not None:
        return _stopped(stopped, "")
    cli.show(f"\n{ablation.table(result)}\n\n{'ablation':10}{workdir / ablation.FILENAME}")
    return 0


def _stopped(number: int, where: str) -> int:
    cli.show(f"stopped by {signal.Signals(number).name}{where}; the same command goes on from there")
    return STOPPED.value if number == signal.SIGTERM else 128 + number


def _check_workdir(workdir: Path, wanted: Config) -> None:
    if not (workdir / "config.json").exists():
        return
    may_change = (*MAY_CHANGE, "model.init_from") if wanted.task == "adapter" else MAY_CHANGE  # its checksum is held
    changed = [
        line for line in config.differences(config.load_config(workdir), wanted) if not line.startswith(may_change)
    ]
    if changed:
        raise UserError(
            f"{workdir} was begun with another configuration ({'; '.join(changed)}): "
            "take the old values or another --workdir"
        )


if __name__ == "__main__":
    cli.define_config_file()
    cli.define_processes()
    cli.run(main, __doc__)
