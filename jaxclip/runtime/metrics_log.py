"""Metrics of a run as JSON lines and TensorBoard events."""

import json
from collections.abc import Mapping
from pathlib import Path

from jaxclip.runtime import files
from jaxclip.runtime.tensorflow import tf

FILENAME = "metrics.jsonl"


class MetricsLog:
    """Appends to the workdir's metrics.jsonl, and writes a new TensorBoard event file.

    A killed run may have logged steps after its newest checkpoint. Rows of steps after `start`, the step from which the
    run resumes, are removed from metrics.jsonl, since they will be written again.
    """

    def __init__(self, workdir: Path, *, start: int):
        self._path = workdir / FILENAME
        rows = [row for row in read(workdir) if row["step"] <= start]
        files.write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = self._path.open("a")
        self._events = tf.summary.create_file_writer(str(workdir / "tensorboard"))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step, as one row of metrics.jsonl and as TensorBoard scalars."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        with self._events.as_default(step=step):
            for name, value in metrics.items():
                tf.summary.scalar(name, value)

    def close(self) -> None:
        self._file.close()
        self._events.close()


class NoMetricsLog:
    """Writes nothing; used by all processes of a run except the first."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def read(workdir: Path) -> list[dict[str, float]]:
    """Returns the rows of a workdir's metrics.jsonl, [] if there is none; rows cut off by a kill are left out."""
    path = workdir / FILENAME
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
