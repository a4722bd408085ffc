"""Checks the flags of the command `evaluate`."""

from pathlib import Path

from jaxclip.errors import UserError


def workdirs(workdir: list[str], compare: list[str], query: list[str], parameters: str, name: str | None) -> list[Path]:
    """Returns the workdirs that the flags name; raises UserError if flags are invalid or contradict each other."""
    names, flag = (compare, "compare") if compare else (workdir, "workdir")
    if not names:
        raise UserError("--workdir is missing: give the folder of a run")
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


def join_compare(argv: list[str]) -> list[str]:
    """Returns the arguments with `--compare W1 W2` rewritten as `--compare=W1,W2`, which absl can parse."""
    if "--compare" not in argv:
        return argv
    index = argv.index("--compare")
    return [*argv[:index], "--compare=" + ",".join(argv[index + 1 : index + 3]), *argv[index + 3 :]]
