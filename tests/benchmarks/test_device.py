"""`bench device` runs each part in a process of its own: failures become rows, and the rows so far are always kept."""

import ast
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from jaxclip.benchmarks import device, device_steps, limited
from jaxclip.benchmarks.captions import CAPTION, captions

ROOT = Path(__file__).parents[2]

FAKES = """
import os, signal, subprocess, sys, time
import jax.numpy as jnp

def works(number):
    print("what a library prints does not mix with the rows")
    yield {"number": number}
    yield {"number": number + 1}

def fails():
    yield {"number": 1}
    raise ValueError("first line\\nsecond line")

def runs_out_of_memory():
    yield {"number": 1}
    jnp.zeros(2**44).block_until_ready()

def is_killed():
    yield {"number": 1}
    os.kill(os.getpid(), signal.SIGKILL)

def exits():
    print("the library's last words", file=sys.stderr)
    os._exit(7)
    yield {}

def is_not_finite():
    yield {"number": float("nan")}

def hangs():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield {"process": os.getpid(), "child": child.pid}
    time.sleep(600)
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """A module of parts that fail in different ways; the processes of the parts find it too."""
    (tmp_path / "fake_parts.py").write_text(FAKES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    import fake_parts

    return fake_parts


def alive(process: int) -> bool:
    """Returns whether a process runs; a zombie, which only waits to be reaped, does not."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.slow
def test_every_part_is_measured_on_this_machine(run, tmp_path):
    path = tmp_path / "device.json"
    done = run("bench", "device", "--minutes=30", "--patience=5", f"--json={path}")
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert results["benchmark"] == "device" and results["machine"]["devices"] == "1"
    rows = {part.name: [row for row in results["rows"] if row["part"] == part.name] for part in device.PARTS}
    assert sum(map(len, rows.values())) == len(results["rows"])
    assert all(name in done.stdout for name in rows)
    assert not [row for row in results["rows"] if row.keys() & {"error", "left_out"}]
    assert [row["implementation"] for row in rows["attention"]] == ["xla"] * 8  # CPUs have no fused attention
    for row in results["rows"]:
        assert all(math.isfinite(value) and value >= 0 for value in row.values() if isinstance(value, int | float))
        assert row.get("seconds", 1) > 0 and row.get("compile_seconds", 1) > 0

    versions, product, copy = rows["machine"]
    assert versions["platform"] == "cpu" and {"jax", "jaxlib", "flax", "python"} <= versions.keys()
    assert product["flops_per_second"] == pytest.approx(2 * 256**3 / product["seconds"])
    assert copy["bytes_per_second"] == pytest.approx(2 * copy["bytes"] / copy["seconds"])
    steps = [row for name in rows if name.startswith("step") for row in rows[name]]
    assert [(row["attention"], row["remat"], row["execution"]) for row in steps[4:]] == [
        ("xla", "none", "auto"),
        ("auto", "qkv,mixed,attended,hidden", "auto"),
        ("auto", "full", "auto"),
        ("auto", "none", "scan"),
    ]
    for row in steps:
        assert row["pairs_per_second"] == pytest.approx(row["pairs"] / row["seconds"])
        assert row["flops_per_second"] == pytest.approx(row["model_flops"] / row["seconds"])
        assert row["model_flops"] == steps[0]["model_flops"]  # whatever is computed twice
        assert row["loss"] == pytest.approx(steps[0]["loss"], rel=1e-3) and row["mfu"] is None
        assert row["slowest_seconds"] >= row["seconds"] and row["peak_memory"] > row["temporaries"] > 0
    assert {row["tokens"] for row in rows["attention"]} == {50, 77, 197, 257}
    realistic, uniform = (
        [row for row in rows["token embedding gradient"] if row["ids"] == ids] for ids in ("realistic", "uniform")
    )
    assert [(row["form"], row["dtype"]) for row in realistic] == [
        (form, dtype) for dtype in ("bfloat16", "float32") for form in ("scatter", "ours", "reached")
    ]
    assert len(uniform) == 4 and realistic[0]["most_frequent"] > 0.5 > uniform[0]["most_frequent"]
    (losses,) = rows["losses on device and CPU"]
    assert losses["largest_difference"] == 0 and losses["losses"] == losses["cpu_losses"]  # both are CPUs
    assert len(losses["losses"]) == 20 and losses["losses"][-1] < losses["losses"][0]
    assert {(row["form"], row["dtype"]) for row in rows["bias gradient"]} == {
        (form, dtype) for form in ("sum", "float32", "product") for dtype in ("bfloat16", "float32")
    }
    assert [(row["implementation"], row["tile"]) for row in rows["InfoNCE"]] == 2 * [
        *[("tiled", tile) for tile in (8, 16, 32, 64)], ("dense", None)
    ]  # fmt: skip
    assert [row["products"] for row in rows["ranks"]] == ["float32", "bfloat16_3x", "bfloat16"]
    (trace,) = rows["trace"]
    assert trace["archive"] == str(tmp_path / "device.trace.tar.gz") and trace["bytes"] < 16 * 2**20
    with tarfile.open(trace["archive"]) as archive:
        assert any(name.endswith(".xplane.pb") for name in archive.getnames())


@pytest.mark.slow
def test_a_part_that_fails_hangs_or_runs_out_of_memory_is_a_row_and_the_others_still_run(fakes):
    parts = [
        device.Part("fails", fakes.fails, 60, {}),
        device.Part("memory", fakes.runs_out_of_memory, 60, {}),
        device.Part("killed", fakes.is_killed, 60, {}),
        device.Part("exits", fakes.exits, 60, {}),
        device.Part("not finite", fakes.is_not_finite, 60, {}),
        device.Part("hangs", fakes.hangs, 30, {}),
        device.Part("works", fakes.works, 60, {"number": 1}, {"number": 5}),
    ]
    rows, seconds = {part.name: [] for part in parts}, {}
    for row in device.measure(minutes=10, parts=parts):
        rows[row.pop("part")].append(row)
        seconds.setdefault("hangs", time.monotonic()) if "child" in row else None
    after = time.monotonic()
    assert rows["fails"] == [{"number": 1}, {"error": "ValueError: first line"}]
    assert rows["memory"][0] == {"number": 1} and "RESOURCE_EXHAUSTED" in rows["memory"][1]["error"]
    assert rows["killed"] == [{"number": 1}, {"error": "the process was killed, probably for lack of main memory"}]
    assert rows["exits"] == [{"error": "the process ended with status 7: the library's last words"}]
    assert "not JSON compliant" in rows["not finite"][0]["error"]
    assert rows["hangs"][1] == {"error": "stopped at its limit of 30 seconds"}
    assert not alive(rows["hangs"][0]["child"]) and after - seconds["hangs"] < 60
    assert rows["works"] == [{"number": 5}, {"number": 6}]  # the toy size
    assert all("\n" not in row.get("error", "") for part in rows.values() for row in part)
    assert all(name in device.table([{"part": name, **row} for row in rows[name]]) for name in rows)


def test_parts_for_which_no_time_is_left_are_listed(fakes, tmp_path):
    parts = [device.Part(name, fakes.works, 60, {"number": 1}) for name in ("first", "second")]
    rows = list(device.measure(minutes=0.1, json=str(tmp_path / "out.json"), parts=parts))
    assert [row["part"] for row in rows] == ["first", "second"]
    assert all("give more with --minutes" in row["left_out"] for row in rows)
    archiving = device.Part("trace", fakes.works, 60, {"number": 1}, archive="trace.tar.gz")
    (row,) = device.measure(minutes=8, parts=[archiving])
    assert "give --json" in row["left_out"]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_keeps_its_rows_and_leaves_no_process(start, tmp_path, stop):
    path = tmp_path / "device.json"
    process = start("bench", "device", f"--json={path}")
    children, deadline = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    parts = [int(child) for child in children.read_text().split()]
    process.send_signal(stop)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == (-stop if stop == signal.SIGKILL else 128 + stop)
    rows = json.loads(path.read_text())["rows"]
    assert rows[0]["measured"] == "versions"
    assert ("versions" in stdout) == (stop != signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(map(alive, parts)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert parts and not any(map(alive, parts))


def test_closing_the_rows_early_kills_the_process(fakes):
    rows = limited.rows("fake_parts:hangs", {}, 120)
    child = next(rows)["child"]
    assert alive(child)
    rows.close()
    assert not alive(child)


def test_a_part_dies_with_the_command_that_is_killed(fakes):
    code = "from jaxclip.benchmarks import limited\nfor row in limited.rows('fake_parts:hangs', {}, 120): print(row)"
    command = subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE, text=True)
    row = ast.literal_eval(command.stdout.readline())
    command.kill()
    command.communicate()
    deadline = time.monotonic() + 10
    while alive(row["process"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(row["child"], signal.SIGKILL)  # only the part itself hears of the death
    assert not alive(row["process"])


def test_an_archive_that_is_too_large_leaves_out_the_largest_files(tmp_path):
    folder = tmp_path / "trace"
    (folder / "inner").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, size in (("small", 1000), ("inner/large", 30_000), ("inner/largest", 50_000)):
        (folder / name).write_bytes(random.bytes(size))
    row = device_steps.pack(folder, tmp_path / "trace.tar.gz", limit=10_000)
    assert [file["file"] for file in row["left_out_files"]] == ["inner/largest", "inner/large"]
    assert row["files"] == 1 and row["bytes"] == (tmp_path / "trace.tar.gz").stat().st_size <= 10_000
    with tarfile.open(tmp_path / "trace.tar.gz") as archive:
        assert archive.getnames() == ["small"]
    assert "inner/largest" in device.table([{"part": "trace", **row}])


def test_realistic_captions_start_have_about_twelve_tokens_and_end():
    ids = captions(1000, 77, 49408)
    assert ids.shape == (1000, 77) and (ids[:, 0] == 49406).all() and (ids[:, -1] == 49407).all()
    lengths = 1 + (ids == 49407).argmax(axis=1)  # with start and end
    assert lengths.mean() == pytest.approx(CAPTION, abs=0.5) and lengths.min() >= 3
    words = ids[ids < 49406]
    assert (np.sort(np.bincount(words))[::-1][:1] / len(words) > 0.05).all()  # the most frequent word
    assert (captions(4, 8, 100)[:, -1] == 99).all()
