"""The configuration of an experiment: frozen dataclasses, filled from a file of configs/ and from the command line.

Every mistake (an unknown key, a wrong type, values that contradict each other) is reported at once. Each field is
declared once, in schema.py or catalogue_sections.py; README.md lists them all.
"""

from jaxclip.config.file import read_file
from jaxclip.config.parse import (
    build,
    differences,
    dump,
    fields,
    fingerprint,
    flat,
    load_config,
    save_config,
    with_first_stage_catalogue,
    without_checkpoint_fields,
)  # fmt: skip
from jaxclip.config.saved import evaluation_name, for_towers, of_run, of_runs, same_catalogue
from jaxclip.config.schema import Config

__all__ = [
    "Config", "build", "differences", "dump", "evaluation_name", "fields", "fingerprint", "flat", "for_towers",
    "load_config", "of_run", "of_runs", "read_file", "same_catalogue", "save_config", "with_first_stage_catalogue",
    "without_checkpoint_fields",
]  # fmt: skip
