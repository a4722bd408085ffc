"""Checks, describes and writes the products of a catalogue with Apache Beam, on the machines of any Beam runner."""

import itertools
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions

from jaxclip.catalog.dataset import Label, example
from jaxclip.catalog.describe import Describer
from jaxclip.catalog.execution import Collected, mended
from jaxclip.catalog.parts import PART, LazySelection, Parts
from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.spool import Spool
from jaxclip.errors import UserError


class BeamExecution:
    """An `Execution` on Beam workers, from which this process reads hashes, but pictures only for the data card.

    Groups and splits depend on all products, so there are two pipelines. This process writes the reader's products,
    without their pictures, to a folder. In the first pipeline, workers check and describe the products and write
    pictures, descriptions and hashes to this folder. When groups and splits are known, TFDS writes the dataset in the
    second pipeline: it shuffles the examples by key and collects each file, about 1 GiB at most, on one worker.

    Args:
      runner: a name such as "DirectRunner", "DataflowRunner", "FlinkRunner" or "SparkRunner", or a full class name.
      options: the runner's options, as "--name=value" or "name=value".
      folder: folder for intermediate files, which all workers must reach under this path.

    Raises:
      UserError: the runner does not exist or is not installed.
    """

    def __init__(self, runner: str, options: Sequence[str], folder: Path):
        try:
            beam.runners.create_runner(runner)
        except (ValueError, ImportError, AttributeError) as error:
            raise UserError(
                f"--runner={runner} is not an installed Apache Beam runner ({error}): give an installed one, such as "
                "DirectRunner, or leave --runner out"
            ) from error
        self._runner = runner
        self._options = [f"--{option.lstrip('-')}" for option in options]
        self._parts = Parts(folder)
        self._numbers = array("Q")  # the numbers in `Parts` of the kept products

    @contextmanager
    def collect(self, rows: Iterable[Product | Oddity], describer: Describer | None) -> Iterator[Collected]:
        parts, numbers = self._parts, self._numbers
        try:
            oddities: list[Oddity] = []
            count = parts.write(_separate_oddities(oddities, rows))
            with beam.Pipeline(runner=self._runner, options=self._pipeline_options()) as pipeline:
                _ = pipeline | _distribute(range(count)) | beam.Map(partial(parts.examine, describer=describer))
            with Spool[Product](parts.folder) as products:
                pictures, descriptions = (
                    LazySelection(parts.pictures, numbers),
                    LazySelection(parts.description, numbers),
                )
                collected = Collected(products, pictures, descriptions if describer else (), oddities=oddities)
                for number, verdict in parts.verdicts(count):
                    oddities += [Oddity(*found, dropped=True) for found in verdict.left_out]
                    if not verdict.pixels:
                        continue
                    numbers.append(number)
                    products.append(verdict.product)
                    collected.sizes.append(verdict.sizes)
                    collected.hashes.append(verdict.pixels)
                    oddities += [mended(verdict.product, kind) for kind in verdict.oddities]
                yield collected
        finally:
            shutil.rmtree(parts.folder, ignore_errors=True)

    def examples(
        self, collected: Collected, labels: Sequence[Label], splits: Mapping[str, Sequence[int]]
    ) -> Mapping[str, beam.PTransform]:
        split_of = [""] * len(labels)
        for split, rows in splits.items():
            for row in rows:
                split_of[row] = split
        parts = []
        assignments = zip(self._numbers, split_of, labels, strict=True)
        for part, members in itertools.groupby(assignments, lambda assignment: assignment[0] // PART):
            self._parts.write_assignments(part, {number % PART: (split, label) for number, split, label in members})
            parts.append(part)
        return {
            split: _distribute(parts) | beam.FlatMap(partial(_split_examples, self._parts, split)) for split in splits
        }

    def download_config(self) -> tfds.download.DownloadConfig:
        return tfds.download.DownloadConfig(beam_runner=self._runner, beam_options=self._pipeline_options())

    def _pipeline_options(self) -> PipelineOptions:
        return PipelineOptions(self._options)


def _separate_oddities(oddities: list[Oddity], rows: Iterable[Product | Oddity]) -> Iterator[Product]:
    """Yields the products and appends the oddities to `oddities`."""
    for row in rows:
        if isinstance(row, Oddity):
            oddities.append(row)
        else:
            yield row


def _distribute(parts: Iterable[int]) -> beam.PTransform:
    # Without the reshuffle, a runner may fuse this step with the next one and run everything on one worker.
    return beam.Create(parts) | beam.Reshuffle()


def _split_examples(parts: Parts, split: str, part: int) -> Iterator[tuple[str, dict[str, Any]]]:
    return (example(*product) for product in parts.assigned_products(part, split))
