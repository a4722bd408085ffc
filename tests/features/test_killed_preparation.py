"""A preparation in several processes survives or reports the kill of any of them at any time."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from jaxclip.catalog import builder
from jaxclip.catalog.builder import Source
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.features.describe import ProductDescriber
from jaxclip.pipeline.records import Records

ROOT = Path(__file__).parents[2]
PRODUCTS = 200
CODE = """
import sys
from pathlib import Path
from jaxclip.catalog import builder
from jaxclip.errors import UserError
from jaxclip.features.describe import ProductDescriber

if __name__ == "__main__":
    source = builder.Source("drawn", Path(sys.argv[1]), 50.0, 42, {}, ProductDescriber())
    try:
        builder.prepare(source, Path(sys.argv[2]), progress=lambda items, **_: items, workers=2)
    except UserError as error:
        sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "shop"
    draw_catalogue(folder, PRODUCTS, 0)
    return folder


@pytest.fixture(scope="module")
def fingerprint(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    source = Source("drawn", raw, 50.0, 42, {}, ProductDescriber())
    builder.prepare(source, folder, progress=lambda items, **_: items, workers=1)
    return builder.metadata(folder)["fingerprint"]


@pytest.fixture
def preparation(raw, tmp_path):
    """Returns a function that starts a preparation into tmp_path / "p"; processes that remain are killed at the end."""
    code, started = tmp_path / "prepare_it.py", set()
    code.write_text(CODE)

    def start():
        process = psutil.Popen(
            [sys.executable, code, raw, tmp_path / "p"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.add(process)
        wait_until(lambda: (tmp_path / "p").exists() or process.poll() is not None)
        return process

    yield start
    for process in started:
        if process.is_running():
            for survivor in (*process.children(recursive=True), process):
                survivor.kill()
        process.wait()


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition was not met within {seconds} s"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_preparation_is_never_mistaken_for_complete_and_its_workers_exit(preparation, tmp_path, fingerprint):
    prepared, killed = tmp_path / "p", 0
    for max_delay in (2.0, 4.0, 8.0):  # the first is shorter than any preparation
        process, delay = preparation(), random.uniform(0, max_delay)
        time.sleep(delay)
        children = process.children(recursive=True)
        process.kill()
        process.wait()
        _, survivors = psutil.wait_procs(children, timeout=20)
        for survivor in survivors:
            survivor.kill()
        assert not survivors, f"killed after {delay} s, it left the processes {survivors}"
        if process.returncode == -signal.SIGKILL and builder.is_prepared(prepared):
            # It was killed after it wrote the last file of the dataset, so the dataset must be complete.
            assert len(Records(prepared, "all")) == PRODUCTS
        killed += not builder.is_prepared(prepared)
    assert killed
    process = preparation()
    assert process.wait() == 0, process.stderr.read()
    assert builder.metadata(prepared)["fingerprint"] == fingerprint
    assert len(Records(prepared, "all").read(np.arange(PRODUCTS))) == PRODUCTS
    assert sorted(path.name for path in prepared.iterdir()) == ["card.html", "catalogue"]
    assert [path.name for path in (prepared / "catalogue").iterdir()] == ["1.0.0"]


@pytest.mark.slow
def test_a_killed_worker_is_reported_and_leaves_no_files_or_processes(preparation, tmp_path):
    process = preparation()
    workers = []

    def both_work():
        workers[:] = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
        return len(workers) == 2 and all(worker.cpu_times().user > 0.5 for worker in workers)

    wait_until(both_work)
    random.choice(workers).kill()
    assert process.wait(60) == 1
    assert "worker process was killed" in process.stderr.read().splitlines()[-1]
    assert not (tmp_path / "p").exists() and not psutil.wait_procs(workers, timeout=20)[1]
