"""Flags, help, start-up and error handling of all commands except `bench`, which has its own."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TextIO

from absl import app, flags
from absl import logging as absl_logging

from jaxclip import config
from jaxclip.config import Config
from jaxclip.config.reference import help_lines
from jaxclip.errors import UserError
from jaxclip.runtime import startup

# Set before TensorFlow and transformers are imported: they warn about CUDA and torch, which are not needed here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Set before TensorFlow is imported: without it TensorFlow imports Keras, scikit-learn and SciPy, which takes seconds.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

USER_ERROR = 2
HELP = ("--help", "-help", "-h", "--helpshort")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Returns argv without `--config.a.b=value` (or `--config.a.b value`) arguments, and these as a.b -> value."""
    rest: list[str] = []
    overrides: dict[str, str] = {}
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(("--config.", "-config.")):
            rest.append(argument)
            continue
        name, equals, value = argument.lstrip("-").removeprefix("config.").partition("=")
        overrides[name] = value if equals else next(arguments, "")
    return rest, overrides


def define_config_file() -> None:
    """Defines --config for a command that takes a file of configs/."""
    flags.DEFINE_string("config", None, "configs/NAME.py or configs/NAME.py:VARIANT")


def define_processes() -> None:
    """Defines the flags of a command that can run as several processes."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, if no scheduler provides it")
    flags.DEFINE_integer("num_processes", None, "number of processes, with --coordinator_address", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "index of this process, from 0, with --coordinator_address")


def join_processes() -> None:
    """Joins this process to its run according to the flags or the scheduler (see `distributed.join`)."""
    from jaxclip.runtime import distributed

    distributed.join(*(flags.FLAGS[name].value for name in distributed.PROCESS_FLAGS))


def usage(help: str) -> str:
    """Returns a command's help: the text `help`, its flags, and a line for every field of the configuration."""
    key_flags = [*flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
    key_flags += flags.FLAGS.get_key_flags_for_module(__name__)
    lines = [help.strip(), "", "flags:", *(f"  --{flag.name}: {flag.help}" for flag in key_flags)]
    lines += ["  --config.section.field=VALUE: overrides one field of the configuration"]
    lines += ["  --help=WORD: lists the fields whose name or meaning contains the word", "", *help_lines()]
    return "\n".join(lines)


def requested_help(argv: Sequence[str]) -> str | None:
    """Returns the word of `--help=WORD`, "" for `--help` without a word, or None if no help is requested."""
    for argument in argv:
        name, _, word = argument.partition("=")
        if name in HELP:
            return word.strip()
    return None


def from_file(overrides: dict[str, str], *, trains: bool = True) -> Config:
    """Returns the configuration of the parsed --config flag with the overrides on top.

    Args:
      overrides: dotted name of a field -> its value as text.
      trains: whether the command trains; if not, steps and epochs may be missing, and fields of the file that a
        checkpoint determines are left out: the command takes the checkpoint of model.init_from as it is.

    Raises:
      UserError: --config is missing, or `config.read_file` or `config.build` raises it.
    """
    if not flags.FLAGS["config"].value:
        raise UserError("--config is missing: give a file of configs/, such as --config=configs/quickstart.py")
    settings = config.read_file(flags.FLAGS["config"].value)
    if not trains and not any(settings.get(name) or overrides.get(name, "0") != "0" for name in ("steps", "epochs")):
        settings, overrides = {**settings, "steps": 1}, {k: v for k, v in overrides.items() if k != "steps"}
    if not trains:
        settings = config.without_checkpoint_fields(settings)
    return config.build(config.with_first_stage_catalogue(settings, overrides), overrides)


def run(main: Callable[[dict[str, str]], int | None], help: str) -> None:
    """Parses the flags, runs main(overrides) and exits with the status that it returns; None counts as 0.

    A UserError, or an OSError of a full or protected disk, is printed as a single message, and the exit status is 2.
    """
    startup.reuse_memory()
    startup.avoid_loading_libtpu()
    startup.set_variables()
    startup.cache_compiled_programs()
    argv, overrides = split_overrides(sys.argv)
    if (word := requested_help(argv[1:])) is not None:
        print("\n".join(help_lines(word)) if word else usage(help))
        sys.exit(0)  # absl's own help exits with status 1 and leaves out --config and the fields
    sys.modules["__main__"].__doc__ = help

    def run_main(rest: list[str]) -> int:
        absl_logging.set_verbosity(absl_logging.WARNING)
        try:
            if rest[1:]:
                raise UserError(f"{' '.join(rest[1:])!r} is not understood: write flags as --name=value")
            status = main(overrides) or 0
        except UserError as error:
            return _failed(error, f"error: {error}", USER_ERROR)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in startup.DISK_ERRORS:
                where = f": {error.filename}" if error.filename else ""
                return _failed(error, f"error: {error.strerror}{where}", USER_ERROR)
            if not _processes():
                raise
            return _failed(error, traceback.format_exc(), 1)
        except KeyboardInterrupt as error:
            if _processes():
                _failed(error, "interrupted", 130)
            raise
        if _processes():
            _processes().leave()
        return status

    app.run(run_main, argv=argv, flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Returns the arguments that are not flags; exits with status 2 and one sentence if a flag is wrong."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {error}; --help lists the flags", file=sys.stderr)
        sys.exit(USER_ERROR)


def say(line: str) -> None:
    """Prints a progress line to standard error; in a run of several processes only process 0 prints."""
    show(line, file=sys.stderr)


def show(text: str, *, file: TextIO | None = None) -> None:
    """Prints results; in a run of several processes only process 0 prints."""
    if not _processes() or _processes().is_primary():
        print(text, file=file, flush=True)


def show_files(folder: Path, *names: str) -> None:
    """Prints the path of each file, after its name without suffix."""
    for name in names:
        show(f"{Path(name).stem:12}{folder / name}")


def _processes() -> ModuleType | None:
    """Returns jaxclip.runtime.distributed if this process has joined others; never imports it, which is slow."""
    module = sys.modules.get("jaxclip.runtime.distributed")
    return module if module and module.store() is not None else None


def _failed(error: BaseException, sentence: str, status: int) -> int:
    """Prints an error and returns the exit status; in a run of several processes, also ends the others."""
    if _processes():
        _processes().fail(error, sentence, status)
    print(sentence, file=sys.stderr)
    return status
