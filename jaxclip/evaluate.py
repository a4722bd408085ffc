"""Evaluate a checkpoint: python -m jaxclip.evaluate --workdir=W [--step=N] [--config.data.path=PATH ...]

The workdir's own configuration is where it starts from; overrides name another catalogue or split.

    python -m jaxclip.evaluate --compare W1 W2       what W2 does better and worse than W1, and whether by chance
    python -m jaxclip.evaluate --workdir=W1,W2 --query="red shoes" --query="..." [--config.data.path=PATH ...]
                                                     the ten pictures that each finds; needs no captions
"""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxclip import cli, config
from jaxclip.errors import UserError
from jaxclip.evaluation import tables
from jaxclip.runtime import startup

if TYPE_CHECKING:
    from jaxclip.evaluation.comparison import Run

WORKDIR = flags.DEFINE_list("workdir", [], "folder of the run; several, separated by commas, with --query")
STEP = flags.DEFINE_string("step", "latest", "the checkpoint: latest, best (by hit@1) or a step")
PARAMETERS = flags.DEFINE_string(
    "parameters", "", "ema: their moving average, the default where the run kept one; raw: as the last step left them"
)
NAME = flags.DEFINE_string(
    "name", None, "the results go into WORKDIR/eval/NAME; default: the split, and the catalogue where it is another one"
)
COMPARE = flags.DEFINE_list("compare", [], "two workdirs, the baseline first")
QUERY = flags.DEFINE_multi_string("query", [], "a sentence to look for; may be given several times")


def main(overrides: dict[str, str]) -> None:
    """Evaluates, compares or looks for sentences as the flags say."""
    cli.join_processes()
    workdirs = _workdirs()
    wanted = config.of_runs(workdirs, overrides)
    with startup.quiet_imports():  # they take seconds: bad flags are told before
        from jaxclip.evaluation import comparison
        from jaxclip.evaluation.comparison import Run
        from jaxclip.runtime import distributed

    runs = []
    for workdir, each in zip(workdirs, wanted, strict=True):
        distributed.check_identical("config", config.flat(each), "Start all with the same overrides")
        own = overrides if each.task == "rerank" else config.for_towers(overrides)
        command = _command([f"--workdir={workdir}"], own)
        runs.append(Run(workdir, each, config.fingerprint(config.load_config(workdir)), command))
    if QUERY.value:
        page, parameters = workdirs[0] / "eval" / (NAME.value or "queries") / "sheet.html", PARAMETERS.value
        asked = [f"--query={sentence}" for sentence in QUERY.value] + [f"--parameters={parameters}"] * bool(parameters)
        given = [f"--workdir={','.join(map(str, workdirs))}", f"--step={STEP.value}", *asked]
        options = {"parameters": parameters, "command": _command(given, overrides), "say": cli.say}
        comparison.write_sheet(page, runs, STEP.value, list(dict.fromkeys(QUERY.value)), **options)
        cli.show(f"{'sheet':10}{page}")
        return
    names = [NAME.value or name for name in [config.evaluation_name(run.workdir, run.config) for run in runs]]
    if COMPARE.value:
        command = _command(["--compare", *map(str, workdirs), f"--step={STEP.value}"], overrides)
        options = {"evaluate": _evaluate, "command": command, "say": cli.say}
        figures, folder = comparison.compare(*runs, *names, STEP.value, **options)
        cli.show(f"\n{tables.compared(figures)}\n")
    else:
        metrics, folder = _evaluate(runs[0], names[0])
        stands = f"checkpoint of step {metrics['checkpoint_step']}, parameters: {metrics['parameters']}"
        cli.show(f"\n{tables.headline(metrics)}\n\n{stands}")
    for path in ("comparison.json" if COMPARE.value else "metrics.json", "report.html"):
        cli.show(f"{Path(path).stem:12}{folder / path}")


def _workdirs() -> list[Path]:
    """Returns the workdirs that the flags name; UserError where the flags do not go together."""
    given, flag = (COMPARE.value, "compare") if COMPARE.value else (WORKDIR.value, "workdir")
    if not given:
        raise UserError("--workdir is missing: give the folder of a run")
    if not all(name.strip() for name in given):
        raise UserError(f"--{flag}={','.join(given)} has an empty name between its commas")
    if COMPARE.value and (len(given) != 2 or WORKDIR.value or QUERY.value or PARAMETERS.value):
        raise UserError("--compare takes two workdirs, as --compare W1 W2, and no --workdir, --query or --parameters")
    if len(given) > 1 and not COMPARE.value and not QUERY.value:
        raise UserError("--workdir names several runs: that is for --query; --compare W1 W2 compares two")
    if PARAMETERS.value not in ("", "ema", "raw"):
        raise UserError(f"--parameters={PARAMETERS.value} is none of ema, raw")
    if not all(sentence.strip() for sentence in QUERY.value):
        raise UserError("--query is empty: give a sentence, as --query='red shoes'")
    if NAME.value is not None and (Path(NAME.value).name != NAME.value or NAME.value in ("", "..")):
        raise UserError(f"--name={NAME.value!r} must be the name of a folder, for WORKDIR/eval/NAME")
    return [Path(workdir).expanduser() for workdir in given]


def _evaluate(run: "Run", name: str) -> tuple[dict[str, Any], Path]:
    from jaxclip.evaluation.evaluator import evaluate_checkpoint
    from jaxclip.reranking import run as rerank

    evaluate = evaluate_checkpoint
    if run.config.task == "rerank":
        evaluate = partial(rerank.evaluate_checkpoint, load_config=config.load_config)
    options = {"parameters": PARAMETERS.value, "fingerprint": run.fingerprint, "say": cli.say}
    return evaluate(run.config, run.workdir, STEP.value, run.workdir / "eval" / name, command=run.command, **options)


def _command(what: list[str], overrides: dict[str, str]) -> str:
    what = [*what, *(f"--config.{name}={value}" for name, value in overrides.items())]
    return shlex.join(["python", "-m", "jaxclip.evaluate", *what, *([f"--name={NAME.value}"] if NAME.value else [])])


def _joined(argv: list[str]) -> list[str]:
    """Returns the arguments with `--compare W1 W2` as the one flag that absl knows."""
    if "--compare" not in argv:
        return argv
    at = argv.index("--compare")
    return [*argv[:at], "--compare=" + ",".join(argv[at + 1 : at + 3]), *argv[at + 3 :]]


if __name__ == "__main__":
    sys.argv = _joined(sys.argv)
    cli.define_processes()
    cli.run(main, __doc__)
