"""A preparation in several processes, any of which may be killed at any moment."""

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
    whole = tmp_path_factory.mktemp("prepared")
    source = Source("drawn", raw, 50.0, 42, {}, ProductDescriber())
    builder.prepare(source, whole, progress=lambda items, **_: items, workers=1)
    return builder.metadata(whole)["fingerprint"]


@pytest.fixture
def preparation(raw, tmp_path):
    """Starts a preparation into tmp_path / "p" and waits until it reads; what is left dies at the end."""
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
            for each in (*process.children(recursive=True), process):
                each.kill()
        process.wait()


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_preparation_passes_for_complete_at_no_moment_and_its_workers_go_with_it(
    preparation, tmp_path, fingerprint
):
    prepared, killed = tmp_path / "p", 0
    for longest in (2.0, 4.0, 8.0):  # the first is shorter than any preparation
        process, delay = preparation(), random.uniform(0, longest)
        time.sleep(delay)
        family = process.children(recursive=True)
        process.kill()
        process.wait()
        _, left = psutil.wait_procs(family, timeout=20)
        for each in left:
            each.kill()
        assert not left, f"killed after {delay} s it left {left}"
        if process.returncode == -signal.SIGKILL and builder.is_prepared(prepared):
            # Killed between the dataset's last file and its own end: then all of it is there.
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
def test_a_killed_worker_is_told_and_leaves_nothing(preparation, tmp_path):
    process = preparation()
    workers = []

    def both_work():
        workers[:] = [each for each in process.children() if "spawn_main" in " ".join(each.cmdline())]
        return len(workers) == 2 and all(each.cpu_times().user > 0.5 for each in workers)

    wait_until(both_work)
    random.choice(workers).kill()
    assert process.wait(60) == 1
    assert "worker process was killed" in process.stderr.read().splitlines()[-1]
    assert not (tmp_path / "p").exists() and not psutil.wait_procs(workers, timeout=20)[1]
