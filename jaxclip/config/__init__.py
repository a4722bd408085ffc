"""The experiment's configuration: frozen dataclasses, filled from a file of configs/ and from the command line.

Every mistake (an unknown key, a wrong type, values that cannot go together) is reported at once.
"""

from jaxclip.config.parse import build, differences, dump, fields, fingerprint, flat, load, on_first_stage
from jaxclip.config.schema import Config
from jaxclip.config.trained import evaluation_name, of_run, of_runs

__all__ = [
    "Config", "build", "differences", "dump", "evaluation_name", "fields", "fingerprint", "flat", "load",
    "of_run", "of_runs", "on_first_stage",
]  # fmt: skip
