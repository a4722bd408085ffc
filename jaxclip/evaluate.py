"""Evaluate a checkpoint: python -m jaxclip.evaluate --workdir=W [--step=N] [--config.data.path=PATH ...]

The configuration comes from the workdir; overrides (--config.FIELD=VALUE) can select another catalogue or split.

    python -m jaxclip.evaluate --config=configs/NAME.py --config.model.init_from=CHECKPOINT
                                                     evaluate a published checkpoint, or another run's, as it is
    python -m jaxclip.evaluate --compare W1 W2       compare W2 with the baseline W1: differences and their significance
    python -m jaxclip.evaluate --workdir=W1,W2 --query="red shoes" --query="..." [--config.data.path=PATH ...]
                                                     write a page with each run's ten best pictures for each
                                                     query; the catalogue needs no captions
"""

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
    "step", "latest", "the checkpoint: latest, best (highest hit@1 on validation) or the number of a step"
)
PARAMETERS = flags.DEFINE_string(
    "parameters", "", "ema (the moving average; default if the run has one) or raw (without averaging)"
)
NAME = flags.DEFINE_string(
    "name", None, "folder of the results in WORKDIR/eval; default: SPLIT, CATALOGUE-SPLIT, or queries with --query"
)
OUTPUT = flags.DEFINE_string(
    "output", None, "folder of the results without --workdir; default: evaluations/CHECKPOINT-CATALOGUE-SPLIT"
)
COMPARE = flags.DEFINE_list("compare", [], "two workdirs to compare, the baseline first")
QUERY = flags.DEFINE_multi_string("query", [], "a sentence to search for; may be repeated")


def main(overrides: dict[str, str]) -> None:
    """Evaluates a run or a checkpoint, compares two runs, or searches for sentences, depending on the flags."""
    cli.join_processes()
    if flags.FLAGS["config"].value:
        command_flags.check_without_workdir((WORKDIR, COMPARE, QUERY, PARAMETERS, NAME, STEP))
        _evaluate_pretrained(overrides)
        return
    names = (WORKDIR.value, COMPARE.value, QUERY.value, PARAMETERS.value, NAME.value, OUTPUT.value)
    runs = command_flags.open_runs(command_flags.workdirs(*names), overrides, NAME.value)
    if QUERY.value:
        _search_sentences(runs, overrides)
    elif COMPARE.value:
        _compare_two(runs, overrides)
    else:
        _evaluate_one(runs[0])


def _evaluate_pretrained(overrides: dict[str, str]) -> None:
    settings = cli.from_file(overrides, trains=False)
    with startup.quiet_imports():
        from jaxclip.evaluation import pretrained

    folder = Path(OUTPUT.value) if OUTPUT.value else pretrained.default_folder(settings)
    arguments = [f"--config={flags.FLAGS['config'].value}", f"--output={folder}"]
    command = command_flags.command_line(arguments, overrides)
    metrics, folder = pretrained.evaluate_pretrained(settings, folder, command=command, say=cli.say)
    cli.show(f"\n{tables.headline(metrics)}\n\n{settings.model.init_from}, without training")
    cli.show_files(folder, "metrics.json", "report.html")


def _search_sentences(runs: list["EvaluatedRun"], overrides: dict[str, str]) -> None:
    from jaxclip.evaluation import comparison

    workdirs, parameters = [run.workdir for run in runs], PARAMETERS.value
    page = workdirs[0] / "eval" / (NAME.value or "queries") / "sheet.html"
    arguments = [f"--workdir={','.join(map(str, workdirs))}", f"--step={STEP.value}"]
    arguments += [f"--query={sentence}" for sentence in QUERY.value] + [f"--parameters={parameters}"] * bool(parameters)
    command = command_flags.command_line(arguments, overrides, NAME.value)
    sentences, options = list(dict.fromkeys(QUERY.value)), {"parameters": parameters, "command": command}
    comparison.write_sheet(page, runs, STEP.value, sentences, **options, say=cli.say)
    cli.show_files(page.parent, page.name)


def _compare_two(runs: list["EvaluatedRun"], overrides: dict[str, str]) -> None:
    from jaxclip.evaluation import comparison

    arguments = ["--compare", *(str(run.workdir) for run in runs), f"--step={STEP.value}"]
    options = {"evaluate": _evaluate, "command": command_flags.command_line(arguments, overrides, NAME.value)}
    figures, folder = comparison.compare(*runs, *map(_name, runs), STEP.value, **options, say=cli.say)
    cli.show(f"\n{tables.compared(figures)}\n")
    cli.show_files(folder, "comparison.json", "report.html")


def _evaluate_one(run: "EvaluatedRun") -> None:
    metrics, folder = _evaluate(run, _name(run))
    checkpoint = f"checkpoint of step {metrics['checkpoint_step']}, parameters: {metrics['parameters']}"
    cli.show(f"\n{tables.headline(metrics)}\n\n{checkpoint}")
    cli.show_files(folder, "metrics.json", "report.html")


def _name(run: "EvaluatedRun") -> str:
    default = config.evaluation_name(run.workdir, run.config)  # checks the split even if it is not used
    return NAME.value or default


def _evaluate(run: "EvaluatedRun", name: str) -> tuple[dict[str, Any], Path]:
    from jaxclip.evaluation.evaluator import evaluate_checkpoint
    from jaxclip.reranking.run import evaluate_reranker

    evaluate = evaluate_reranker if run.config.task == "rerank" else evaluate_checkpoint
    return evaluate(run, STEP.value, run.workdir / "eval" / name, parameters=PARAMETERS.value, say=cli.say)


if __name__ == "__main__":
    sys.argv = command_flags.join_compare(sys.argv)
    cli.define_config_file()
    cli.define_processes()
    cli.run(main, __doc__)
