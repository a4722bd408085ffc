"""Evaluate a checkpoint: python -m jaxclip.evaluate --workdir=W [--step=N] [--config.data.path=PATH ...]

The workdir's own configuration is where it starts from; overrides name another catalogue or split.

    python -m jaxclip.evaluate --compare W1 W2       what W2 does better and worse than W1, and whether by chance
    python -m jaxclip.evaluate --workdir=W1,W2 --query="red shoes" --query="..." [--config.data.path=PATH ...]
                                                     the ten pictures that each finds; needs no captions
"""

import re
import shlex
import sys
from functools import partial
from pathlib import Path

from absl import flags

from jaxclip import command_line, config
from jaxclip.errors import UserError
from jaxclip.retrieval import tables

WORKDIR = flags.DEFINE_list("workdir", [], "folder of the run; several, separated by commas, with --query")
STEP = flags.DEFINE_string("step", "latest", "the checkpoint: latest, best (by hit@1) or a step")
PARAMETERS = flags.DEFINE_enum(
    "parameters",
    None,
    ["ema", "raw"],
    "ema: their moving average, the default where the run kept one (optimizer.ema); raw: as the last step left them",
)
NAME = flags.DEFINE_string(
    "name",
    None,
    "the results go into WORKDIR/eval/NAME; default: the split, and the catalogue's folder where it is another one",
)
COMPARE = flags.DEFINE_list("compare", [], "two workdirs, the baseline first")
QUERY = flags.DEFINE_multi_string("query", [], "a sentence to look for; may be given several times")
TRAINING = r"(augmentation|checkpoint|loss|optimizer)\..*|epochs|steps|model\.(preset|patch|stochastic_depth|.*dropout)"


def main(overrides: dict[str, str]) -> None:
    """Evaluates, compares or looks for sentences as the flags say."""
    command_line.join_processes()
    workdirs = [Path(workdir) for workdir in COMPARE.value or WORKDIR.value]
    if not workdirs:
        raise UserError("--workdir is missing: give the folder of a run")
    if COMPARE.value and (len(workdirs) != 2 or WORKDIR.value or QUERY.value or PARAMETERS.value):
        raise UserError("--compare takes two workdirs, as --compare W1 W2, and no --workdir, --query or --parameters")
    if len(workdirs) > 1 and not COMPARE.value and not QUERY.value:
        raise UserError("--workdir names several runs: that is for --query; --compare W1 W2 compares two")
    if idle := [key for key in overrides if re.fullmatch(TRAINING, key)]:
        raise UserError(f"--config.{idle[0]} is of the training, which is over: it would change nothing")
    wanted = {workdir: config.load(workdir, overrides) for workdir in workdirs}
    with command_line.quiet_imports():  # they take seconds: bad flags are told before
        from jaxclip.training import comparison, distributed

    for each in wanted.values():
        distributed.check_identical("config", config.flat(each), "Start all with the same overrides")
    if QUERY.value:
        page = workdirs[0] / "eval" / (NAME.value or "queries") / "sheet.html"
        sentences = list(dict.fromkeys(QUERY.value))
        options = {"parameters": PARAMETERS.value or "", "command": _command(), "say": command_line.say}
        comparison.write_sheet(page, wanted, STEP.value, sentences, **options)
        command_line.show(f"{'sheet':10}{page}")
        return
    if not COMPARE.value:
        _evaluate(workdirs[0], overrides, shown=True)
        return
    for workdir in workdirs:
        kept = workdir / "eval" / _name(workdir, overrides) / "queries.npz"
        if flags.FLAGS["step"].present or not distributed.from_primary("kept", kept.exists):
            command_line.say(f"evaluating {workdir} first")
            _evaluate(workdir, overrides, shown=False)
    name = _name(workdirs[1], overrides)
    figures, folder = comparison.compare(wanted[workdirs[1]], *workdirs, name, command=_command(), say=command_line.say)
    command_line.show(f"\n{tables.compared(figures)}\n")
    for path in ("comparison.json", "report.html"):
        command_line.show(f"{Path(path).stem:12}{folder / path}")


def _name(workdir: Path, overrides: dict[str, str]) -> str:
    own, wanted = config.load(workdir), config.load(workdir, overrides)
    if not NAME.value and (wanted.data.path, wanted.data.reader) != (own.data.path, own.data.reader):
        return f"{Path(wanted.data.path).name or wanted.data.reader}-{wanted.data.split}"
    return NAME.value or wanted.data.split


def _command() -> str:
    return shlex.join(["python", "-m", "jaxclip.evaluate", *sys.argv[1:]])


def _evaluate(workdir: Path, overrides: dict[str, str], *, shown: bool) -> None:
    from jaxclip.training import evaluation, rerank

    own, wanted = config.load(workdir), config.load(workdir, overrides)
    evaluate = evaluation.evaluate_checkpoint
    if wanted.task == "rerank":
        evaluate = partial(rerank.evaluate_checkpoint, load_config=config.load)
    folder = workdir / "eval" / _name(workdir, overrides)
    options = {"parameters": PARAMETERS.value or "", "fingerprint": config.fingerprint(own), "say": command_line.say}
    metrics, folder = evaluate(wanted, workdir, STEP.value, folder, command=_command() if shown else "", **options)
    if not shown:
        return
    command_line.show(f"\n{tables.headline(metrics)}\n")
    command_line.show(f"checkpoint of step {metrics['checkpoint_step']}, parameters: {metrics['parameters']}")
    for path in ("metrics.json", "report.html"):
        command_line.show(f"{Path(path).stem:10}{folder / path}")


def _joined(argv: list[str]) -> list[str]:
    """Returns the arguments with `--compare W1 W2` as the one flag that absl knows."""
    if "--compare" not in argv:
        return argv
    at = argv.index("--compare")
    return [*argv[:at], "--compare=" + ",".join(argv[at + 1 : at + 3]), *argv[at + 3 :]]


if __name__ == "__main__":
    sys.argv = _joined(sys.argv)
    command_line.define_processes()
    command_line.run(main, __doc__)
