"""Evaluate a checkpoint: python -m jaxclip.evaluate --workdir=W [--step=N] [--config.data.path=PATH ...]

The workdir's own configuration is where it starts from; overrides name another catalogue or split.
"""

from functools import partial
from pathlib import Path

from absl import flags

from jaxclip import command_line, config
from jaxclip.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
STEP = flags.DEFINE_string("step", "latest", "the checkpoint: latest, best (by hit@1) or a step")
NAME = flags.DEFINE_string(
    "name",
    None,
    "the results go into WORKDIR/eval/NAME; default: the split, and the catalogue's folder where it is another one",
)


def main(overrides: dict[str, str]) -> None:
    """Evaluates as the flags say."""
    if not WORKDIR.value:
        raise UserError("--workdir is missing: give the folder of a run")
    workdir = Path(WORKDIR.value)
    own, wanted = config.load(workdir), config.load(workdir, overrides)
    with command_line.quiet_imports():  # they take seconds: bad flags are told before
        from jaxclip.retrieval import second_stage
        from jaxclip.training import evaluation, rerank

    name = NAME.value or wanted.data.split
    if not NAME.value and (wanted.data.path, wanted.data.reader) != (own.data.path, own.data.reader):
        name = f"{Path(wanted.data.path).name or wanted.data.reader}-{wanted.data.split}"
    folder = workdir / "eval" / name
    reranks = wanted.task == "rerank"
    evaluate = (
        partial(rerank.evaluate_checkpoint, load_config=config.load) if reranks else evaluation.evaluate_checkpoint
    )
    metrics = evaluate(wanted, workdir, STEP.value, folder, fingerprint=config.fingerprint(own), say=command_line.say)
    print(f"\n{(second_stage if reranks else evaluation).table(metrics)}\n")
    print(f"checkpoint of step {metrics['checkpoint_step']}")
    for path in ("metrics.json", "report.html"):
        print(f"{Path(path).stem:10}{folder / path}")


if __name__ == "__main__":
    command_line.run(main, __doc__)
