"""The experiment's configuration: frozen dataclasses, filled from a file of configs/ and from the command line.

Every mistake (an unknown key, a wrong type, values that cannot go together) is reported at once.
"""

from jaxclip.config.parse import build, differences, dump, fields, fingerprint, flat, load, on_first_stage
from jaxclip.config.schema import Config

__all__ = ["Config", "build", "differences", "dump", "fields", "fingerprint", "flat", "load", "on_first_stage"]
