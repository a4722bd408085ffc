"""Evaluate a checkpoint: python -m jaxclip.evaluate --workdir=W [--step=N] [--config.data.path=PATH ...]

The configuration comes from the workdir; overrides (--config.FIELD=VALUE) can select another catalogue or split.

    python -m jaxclip.evaluate --compare W1 W2       compare W2 with the baseline W1: differences and their significance
    python -m jaxclip.evaluate --workdir=W1,W2 --query="red shoes" --query="..." [--config.data.path=PATH ...]
                                                     write a page with each run's ten best pictures for each
                                                     query; the catalogue needs no captions
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxclip import cli, config
from jaxclip.evaluation import command_flags, tables
from jaxclip.runtime import startup

if TYPE_CHECKING:
    from jaxclip.evaluation.evaluator import EvaluatedRun

WORKDIR = flags.DEFINE_list("workdir", [], "folder of the run; --query also takes several, separated by commas")
STEP = flags.DEFINE_string(
    "step", "latest", "the checkpoint: latest, best (highest hit@1 during training) or the number of a step"
)
PARAMETERS = flags.DEFINE_string(
    "parameters", "", "ema (the moving average; default if the run has one) or raw (without averaging)"
)
NAME = flags.DEFINE_string(
    "name",
    None,
    "results are written to WORKDIR/eval/NAME; default: SPLIT, or CATALOGUE-SPLIT for another catalogue; with --query: "
    "queries",
)
COMPARE = flags.DEFINE_list("compare", [], "two workdirs to compare, the baseline first")
QUERY = flags.DEFINE_multi_string("query", [], "a sentence to search for; may be repeated")


def main(overrides: dict[str, str]) -> None:
    """Evaluates a run, compares two runs, or searches for sentences, depending on the flags."""
    cli.join_processes()
    workdirs = command_flags.workdirs(WORKDIR.value, COMPARE.value, QUERY.value, PARAMETERS.value, NAME.value)
    configs = config.of_runs(workdirs, overrides)
    with startup.quiet_imports():  # these imports take seconds, so the flags are checked first
        from jaxclip.evaluation.evaluator import EvaluatedRun
        from jaxclip.runtime import distributed

    runs = []
    for workdir, settings in zip(workdirs, configs, strict=True):
        distributed.check_identical("config", config.flat(settings), "Start all processes with the same overrides")
        own_overrides = overrides if settings.task == "rerank" else config.for_towers(overrides)
        command = _command([f"--workdir={workdir}"], own_overrides)
        runs.append(EvaluatedRun(workdir, settings, config.fingerprint(config.load_config(workdir)), command))
    if QUERY.value:
        _search_sentences(runs, overrides)
    elif COMPARE.value:
        _compare_two(runs, overrides)
    else:
        _evaluate_one(runs[0])


def _search_sentences(runs: list["EvaluatedRun"], overrides: dict[str, str]) -> None:
    from jaxclip.evaluation import comparison

    workdirs, parameters = [run.workdir for run in runs], PARAMETERS.value
    page = workdirs[0] / "eval" / (NAME.value or "queries") / "sheet.html"
    arguments = [f"--workdir={','.join(map(str, workdirs))}", f"--step={STEP.value}"]
    arguments += [f"--query={sentence}" for sentence in QUERY.value] + [f"--parameters={parameters}"] * bool(parameters)
    options = {"parameters": parameters, "command": _command(arguments, overrides), "say": cli.say}
    comparison.write_sheet(page, runs, STEP.value, list(dict.fromkeys(QUERY.value)), **options)
    cli.show(f"{'sheet':10}{page}")


def _compare_two(runs: list["EvaluatedRun"], overrides: dict[str, str]) -> None:
    from jaxclip.evaluation import comparison

    workdirs = [str(run.workdir) for run in runs]
    command = _command(["--compare", *workdirs, f"--step={STEP.value}"], overrides)
    options = {"evaluate": _evaluate, "command": command, "say": cli.say}
    figures, folder = comparison.compare(*runs, *map(_name, runs), STEP.value, **options)
    cli.show(f"\n{tables.compared(figures)}\n")
    _show_files(folder, "comparison.json", "report.html")


def _evaluate_one(run: "EvaluatedRun") -> None:
    metrics, folder = _evaluate(run, _name(run))
    checkpoint = f"checkpoint of step {metrics['checkpoint_step']}, parameters: {metrics['parameters']}"
    cli.show(f"\n{tables.headline(metrics)}\n\n{checkpoint}")
    _show_files(folder, "metrics.json", "report.html")


def _name(run: "EvaluatedRun") -> str:
    return NAME.value or config.evaluation_name(run.workdir, run.config)


def _show_files(folder: Path, *names: str) -> None:
    for name in names:
        cli.show(f"{Path(name).stem:12}{folder / name}")


def _evaluate(run: "EvaluatedRun", name: str) -> tuple[dict[str, Any], Path]:
    from jaxclip.evaluation.evaluator import evaluate_checkpoint
    from jaxclip.reranking.run import evaluate_reranker

    evaluate = evaluate_reranker if run.config.task == "rerank" else evaluate_checkpoint
    return evaluate(run, STEP.value, run.workdir / "eval" / name, parameters=PARAMETERS.value, say=cli.say)


def _command(arguments: list[str], overrides: dict[str, str]) -> str:
    fields = [f"--config.{name}={value}" for name, value in overrides.items()]
    name = [f"--name={NAME.value}"] if NAME.value else []
    return shlex.join(["python", "-m", "jaxclip.evaluate", *arguments, *fields, *name])


if __name__ == "__main__":
    sys.argv = command_flags.join_compare(sys.argv)
    cli.define_processes()
    cli.run(main, __doc__)
