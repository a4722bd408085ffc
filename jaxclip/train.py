"""Train the towers: python -m jaxclip.train --config=configs/quickstart.py [--workdir=W] [--config.a.b=value ...]

Started again with the same workdir, it goes on from the newest checkpoint. SIGTERM and Ctrl-C save and stop.
"""

import json
import os
import signal
import time
from pathlib import Path

from absl import flags

from jaxclip import command_line, config
from jaxclip.config import Config
from jaxclip.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; default: runs/ and the name of the config file")
MAY_CHANGE = ("checkpoint.", "evaluation.", "log_every", "mesh.", "data.path", "data.prepared", "data.workers")


def main(overrides: dict[str, str]) -> int:
    """Trains as the flags say; returns the exit status."""
    wanted = command_line.from_file(overrides)
    workdir = Path(WORKDIR.value or Path("runs") / Path(flags.FLAGS["config"].config_filename).stem)
    _check_workdir(workdir, wanted)
    with command_line.quiet_imports():  # they take seconds: bad flags are told before
        from jaxclip.training import evaluation
        from jaxclip.training.train import train

    started = time.perf_counter()
    outcome = train(
        wanted,
        workdir,
        save_config=lambda: _save(workdir, wanted),
        load_config=config.load,
        fingerprint=config.fingerprint(wanted),
        say=command_line.say,
    )
    if outcome.signal is not None:
        print(
            f"stopped by {signal.Signals(outcome.signal).name} at step {outcome.step}, saved; "
            f"the same command goes on from there"
        )
        return 0 if outcome.signal == signal.SIGTERM else 128 + outcome.signal
    if outcome.zero_shot is not None:
        print(f"\n{evaluation.comparison(outcome.zero_shot, outcome.metrics)}")
    print(f"\n{evaluation.table(outcome.metrics, outcome.raw)}\n")
    for what, path in (
        ("workdir", workdir),
        ("metrics", outcome.folder / "metrics.json"),
        ("report", outcome.folder / "report.html"),
    ):
        print(f"{what:10}{path}")
    print(f"{'time':10}{(time.perf_counter() - started) / 60:.1f} min")
    return 0


def _check_workdir(workdir: Path, wanted: Config) -> None:
    if not (workdir / "config.json").exists():
        return
    may_change = (*MAY_CHANGE, "model.init_from") if wanted.task == "adapter" else MAY_CHANGE  # its checksum is held
    changed = [line for line in config.differences(config.load(workdir), wanted) if not line.startswith(may_change)]
    if changed:
        raise UserError(
            f"{workdir} was begun with another configuration ({'; '.join(changed)}): "
            "take the old values or another --workdir"
        )


def _save(workdir: Path, wanted: Config) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / "config.json.tmp"
    temporary.write_text(json.dumps(config.dump(wanted), indent=2) + "\n")
    os.replace(temporary, workdir / "config.json")


if __name__ == "__main__":
    command_line.define_config_file()
    command_line.run(main, __doc__)
