"""The flags of the command `evaluate`: what they name, what contradicts, and the command line that repeats them."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl.flags import FlagHolder

from jaxclip import config
from jaxclip.errors import UserError
from jaxclip.runtime import startup

if TYPE_CHECKING:
    from jaxclip.evaluation.evaluator import EvaluatedRun


def workdirs(
    workdir: list[str], compare: list[str], query: list[str], parameters: str, name: str | None, output: str | None
) -> list[Path]:
    """Returns the workdirs that the flags name; raises UserError if flags are invalid or contradict each other."""
    names, flag = (compare, "compare") if compare else (workdir, "workdir")
    if not names:
        raise UserError("--workdir is missing: give the folder of a run")
    if output is not None:
        raise UserError("--output is only for evaluations without a workdir: give --name, for WORKDIR/eval/NAME")
    if not all(each.strip() for each in names):
        raise UserError(f"--{flag}={','.join(names)} has an empty name: remove the extra comma")
    if compare and (len(names) != 2 or workdir or query or parameters):
        raise UserError("--compare takes two workdirs, as --compare W1 W2, and no --workdir, --query or --parameters")
    if len(names) > 1 and not compare and not query:
        raise UserError("--workdir may name several runs only with --query; --compare W1 W2 compares two")
    if parameters not in ("", "ema", "raw"):
        raise UserError(f"--parameters={parameters} is not one of ema, raw")
    if not all(sentence.strip() for sentence in query):
        raise UserError("--query is empty: give a sentence, such as --query='red shoes'")
    if name is not None and (Path(name).name != name or name in ("", "..")):
        raise UserError(f"--name={name!r} must be the name of a folder, for WORKDIR/eval/NAME")
    return [Path(path).expanduser() for path in names]


def check_without_workdir(only_runs: Sequence[FlagHolder]) -> None:
    """Raises UserError if one of the flags that need a workdir is given, together with --config, which needs none."""
    if given := [flag.name for flag in only_runs if flag.present]:
        flags = ", ".join(f"--{name}" for name in given)
        raise UserError(
            f"{flags} cannot be used with --config, which evaluates config.model.init_from without a workdir; to "
            "evaluate a run, leave --config out"
        )


def open_runs(workdirs: Sequence[Path], overrides: dict[str, str], name: str | None) -> list["EvaluatedRun"]:
    """Returns the runs of workdirs with their configurations, which all processes must share."""
    configs = config.of_runs(workdirs, overrides)
    with startup.quiet_imports():  # these imports take seconds, so the flags are checked first
        from jaxclip.evaluation.evaluator import EvaluatedRun
        from jaxclip.runtime import distributed

    runs = []
    for workdir, settings in zip(workdirs, configs, strict=True):
        distributed.check_identical("config", config.flat(settings), "Start all processes with the same overrides")
        own_overrides = overrides if settings.task == "rerank" else config.for_towers(overrides)
        command = command_line([f"--workdir={workdir}"], own_overrides, name)
        runs.append(EvaluatedRun(workdir, settings, config.fingerprint(config.load_config(workdir)), command))
    return runs


def command_line(arguments: Sequence[str], overrides: Mapping[str, str], name: str | None = None) -> str:
    """Returns the command `evaluate` with these arguments, quoted for a shell."""
    fields = [f"--config.{field}={value}" for field, value in overrides.items()]
    return shlex.join(["python", "-m", "jaxclip.evaluate", *arguments, *fields, *[f"--name={name}"] * bool(name)])


def join_compare(argv: list[str]) -> list[str]:
    """Returns the arguments with `--compare W1 W2` rewritten as `--compare=W1,W2`, which absl can parse."""
    if "--compare" not in argv:
        return argv
    index = argv.index("--compare")
    return [*argv[:index], "--compare=" + ",".join(argv[index + 1 : index + 3]), *argv[index + 3 :]]
