"""What all commands share: --config and its overrides, and one clear sentence where the user has to act."""

import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TextIO

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from jaxclip import config
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.runtime import startup

# Before TensorFlow and transformers are imported: they tell of CUDA and torch, which they are not asked for.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

USER_ERROR = 2
HELP = {"--help", "-help", "-h", "--helpshort"}


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Returns argv without its `--config.a.b=value` (or `--config.a.b value`) arguments, and those as a.b -> value."""
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


def define_config_file(default: str | None = None) -> None:
    """Defines --config for a command that takes a file of configs/."""
    config_flags.DEFINE_config_file(
        "config",
        default,
        "configs/NAME.py or configs/NAME.py:ARG",
        sys_argv=[],
    )


def define_processes() -> None:
    """Defines the flags of a command that may run as several processes."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where no scheduler tells it")
    flags.DEFINE_integer("num_processes", None, "number of processes, with --coordinator_address", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "number of this process, from 0, with --coordinator_address")


def join_processes() -> None:
    """Makes this process one of a run's, as the flags or the scheduler say (see `distributed.join`)."""
    from jaxclip.runtime import distributed

    distributed.join(*(flags.FLAGS[name].value for name in distributed.FOUND_BY))


def usage(help: str) -> str:
    """Returns a command's help: what it does, its flags and every field of the configuration."""
    defined = [*flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
    defined += flags.FLAGS.get_key_flags_for_module(__name__)
    lines = [help.strip(), "", "flags:", *(f"  --{flag.name}: {flag.help}" for flag in defined)]
    fields = textwrap.wrap(", ".join(config.fields()), 110, initial_indent="    ", subsequent_indent="    ")
    lines += ["  --config.section.field=VALUE: overrides one field of", *fields]
    lines += [
        "  optimizer.rates are pairs: a regex of parameter names and a factor of the learning rate, 0 = frozen, as"
    ]
    lines += ["    (('^image/stem', 0.0), ('blocks/11/.*bias$', 0.5)); on the command line also {'^image/stem': 0.0}"]
    return "\n".join(lines)


def from_file(overrides: dict[str, str]) -> Config:
    """Returns the configuration of the parsed --config flag with the overrides on top; UserError as `config.build`."""
    if flags.FLAGS["config"].value is None:
        raise UserError("--config is missing: give a file of configs/, as --config=configs/quickstart.py")
    return config.build(config.on_first_stage(flags.FLAGS["config"].value, overrides), overrides)


def run(main: Callable[[dict[str, str]], int | None], help: str) -> None:
    """Runs main(overrides) after absl has parsed the flags, and exits with what it returns, 0 for None.

    A UserError is printed as its one message and exits with status 2.
    """
    startup.reuse_memory()
    startup.leave_absent_tpus_alone()
    startup.keep_compiled()
    argv, overrides = split_overrides(sys.argv)
    if HELP & set(argv[1:]):
        print(usage(help))
        sys.exit(0)  # absl's own help exits with 1, leaves out --config and knows no fields
    sys.modules["__main__"].__doc__ = help

    def guarded(rest: list[str]) -> int:
        absl_logging.set_verbosity(absl_logging.WARNING)
        try:
            if rest[1:]:
                raise UserError(f"{' '.join(rest[1:])!r} is not understood: flags are written --name=value")
            status = main(overrides) or 0
        except UserError as error:
            return _failed(error, f"error: {error}", USER_ERROR)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in startup.SURROUNDINGS:
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

    app.run(guarded, argv=argv)


def say(line: str) -> None:
    """Prints a line for the user, beside the results that go to standard output; of several processes the first one."""
    show(line, file=sys.stderr)


def show(text: str, *, file: TextIO | None = None) -> None:
    """Prints results; of several processes the first one."""
    if not _processes() or _processes().is_primary():
        print(text, file=file, flush=True)


def _processes() -> ModuleType | None:
    """Returns the module of a run's processes once this one has joined them; importing it takes a second."""
    module = sys.modules.get("jaxclip.runtime.distributed")
    return module if module and module.store() is not None else None


def _failed(error: BaseException, sentence: str, status: int) -> int:
    if _processes():
        _processes().fail(error, sentence, status)
    print(sentence, file=sys.stderr)
    return status
