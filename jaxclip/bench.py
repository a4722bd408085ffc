"""Measure this machine: python -m jaxclip.bench NAME [--json=PATH]

ranks    ranks and the best 20 of 41,446 texts and pictures, beside faiss, open_clip, torchmetrics and a numpy sort
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from jaxclip import command_line
from jaxclip.errors import UserError

JSON = flags.DEFINE_string("json", None, "the measurements also go into this file")


def _ranks() -> tuple[dict[str, Any], str]:
    from jaxclip.retrieval import measure

    rows = measure.measure()
    return rows, measure.table(rows)


BENCHES: dict[str, Callable[[], tuple[dict[str, Any], str]]] = {"ranks": _ranks}


def main(name: str) -> None:
    """Measures what the name says."""
    if name not in BENCHES:
        raise UserError(f"{name!r} is none of {', '.join(BENCHES)}: python -m jaxclip.bench NAME")
    rows, table = BENCHES[name]()
    print(table)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    sys.argv = [argument for argument in sys.argv if argument not in names[:1]]
    command_line.run(lambda overrides: main(names[0] if names else ""), __doc__)
