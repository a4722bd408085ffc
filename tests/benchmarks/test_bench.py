"""The command `bench` measures every installed implementation, prints a table and writes its rows as JSON."""

import importlib.util
import json
import math
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxclip.benchmarks import input as input_benchmark
from jaxclip.benchmarks import search as search_benchmark
from jaxclip.benchmarks import train_step, workers
from jaxclip.errors import UserError
from jaxclip.models.presets import PRESETS, clip_config
from jaxclip.towers.params import make_model

OWN_LOSSES = {"dense", "tiled", "checkpointed strips"}


@pytest.mark.slow
def test_every_loss_implementation_is_measured(run, tmp_path):
    path = tmp_path / "loss.json"
    done = run("bench", "loss", "--rows=512", "--dimension=32", "--repeats=1", "--tile=128", f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = {row["implementation"]: row for row in json.loads(path.read_text())["rows"]}
    implementations = OWN_LOSSES | ({"open_clip ClipLoss"} if importlib.util.find_spec("open_clip") else set())
    assert rows.keys() == implementations
    for name, row in rows.items():
        assert name in done.stdout and row["seconds"] > 0 and row["flops_per_second"] > 0
    assert rows["dense"]["time_ratio"] == 1.0
    assert rows["tiled"]["temporaries"] < rows["dense"]["temporaries"]
    assert rows["dense"]["temporaries"] >= 4 * 512 * 512


def test_second_stages_are_compared_with_retrieval(run, tmp_path):
    path = tmp_path / "rerank.json"
    sizes = ("--items=120", "--candidates=5", "--dimension=16", "--batch=500", "--repeats=1")
    done = run("bench", "rerank", *sizes, f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = {row["implementation"]: row for row in json.loads(path.read_text())["rows"]}
    assert {name.split(",")[0] for name in rows} == {"retrieval", "gated", "paper", "cross-attention"}
    assert rows["retrieval"]["time_ratio"] == 1.0
    assert all(name in done.stdout and row["seconds"] > 0 for name, row in rows.items())


@pytest.mark.slow
def test_ranks_are_compared_with_the_installed_libraries(run, tmp_path):
    path = tmp_path / "ranks.json"
    done = run("bench", "ranks", "--items=400", "--repeats=1", f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = {row.pop("implementation"): row for row in json.loads(path.read_text())["rows"]}
    assert {"both ways, top 20", "one way, top 20", "one way, bfloat16", "numpy sort, small", "memory"} <= rows.keys()
    assert ("two searches of faiss, top 20" in rows) == (importlib.util.find_spec("faiss") is not None)
    assert all(row["seconds"] > 0 for name, row in rows.items() if name != "memory")
    ours = {name for name, row in rows.items() if row.get("time_ratio") == 1.0}
    assert ours == {"both ways, top 20", "both ways, small", "one way, few texts"}
    assert abs(rows["one way, bfloat16"]["hit@10 changed"]) < 0.05 and rows["memory"]["items"] == 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["los"], "invalid choice: 'los'"),
        (["loss", "--rows=0"], "0 must be at least 1"),
        (["loss", "--colour"], "unrecognized arguments: --colour"),
        (["loss", "--json=/nowhere/at/all.json"], "the folder /nowhere/at does not exist"),
    ],
)
def test_a_wrong_command_line_is_reported(capsys, arguments, message):
    from jaxclip import bench

    with pytest.raises(SystemExit) as exited:
        bench.main(arguments)
    assert exited.value.code == 2 and message in capsys.readouterr().err


def test_an_unknown_precision_is_reported(capsys):
    from jaxclip import bench

    assert bench.main(["loss", "--rows=8", "--dimension=4", "--products=float16"]) == 2
    assert "--products=float16 must be one of float32, bfloat16, bfloat16_3x" in capsys.readouterr().err


def test_the_loss_by_strips_equals_info_nce():
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxclip.benchmarks.loss import STRIP, by_strips
    from jaxclip.losses.contrastive import info_nce

    images, texts = np.random.default_rng(0).normal(size=(2, 2 * STRIP, 8)).astype(np.float32)
    value, gradient = jax.value_and_grad(by_strips)(images, texts, jnp.float32(2.0))
    expected, expected_gradient = jax.value_and_grad(lambda *args: info_nce(*args)[0])(images, texts, jnp.float32(2.0))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


COUNTER = """
import itertools, os

def make(start):
    numbers = itertools.count(start)
    return {"count": lambda: next(numbers), "fail": lambda: 1 // 0, "end": lambda: os._exit(7)}
"""


def test_a_worker_answers_calls_and_its_failure_is_reported(tmp_path, monkeypatch):
    (tmp_path / "counter.py").write_text(COUNTER)
    monkeypatch.syspath_prepend(tmp_path)
    with workers.Worker("counter", "counter:make", 3) as worker:
        assert worker.calls == ["count", "fail", "end"]
        seconds, first = worker.run("count")
        assert first == 3 and worker.run("count")[1] == 4 and 0 < seconds < 1
        assert worker.peak_memory() > 2**20
        with pytest.raises(UserError, match="the process of counter ended with status 7"):
            worker.run("end")
    with workers.Worker("counter", "counter:make", 3) as worker, pytest.raises(RuntimeError, match="ZeroDivision"):
        worker.run("fail")


@pytest.mark.slow
def test_a_training_step_is_compared_with_open_clip_and_transformers(run, tmp_path):
    path = tmp_path / "step.json"
    done = run("bench", "train_step", "--preset=tiny", "--batch=4", "--repeats=1", f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    peers = [name for name, packages in train_step.PEERS.items() if all(map(importlib.util.find_spec, packages))]
    assert [(row["measured"], row["implementation"]) for row in rows] == [
        (call, name) for call in ("train step", "images", "texts") for name in ("jaxclip", *peers)
    ]
    for row in rows:
        assert row["per_second"] == pytest.approx(4 / row["seconds"])
        assert 0 < row["flops_per_second"] < row["limit"] and row["memory"] > 100 * 2**20
    step, images, texts = (row["flops_per_second"] * row["seconds"] for row in rows[:: len(peers) + 1])
    assert step == pytest.approx(3 * (images + texts), rel=0.1)  # a backward pass costs twice a forward pass


@pytest.mark.parametrize("preset", ["tiny", "vit_b_32"])
@pytest.mark.parametrize("name", ["open_clip", "transformers"])
def test_the_peers_have_as_many_parameters_as_our_towers_and_learn(name, preset):
    for package in train_step.PEERS[name]:
        pytest.importorskip(package)
    from jaxclip.benchmarks import peers

    small = replace(PRESETS[preset], patch=16, image=(64, 2, 1), text=(64, 2, 1), embedding=32)
    text = {"vocab_size": 300, "context_length": 8, "end_token": 299}
    shape = clip_config(small, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, **text)
    _, ours = make_model(shape)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(ours))
    calls = getattr(peers, name)(shape, 2)
    losses = [calls["train step"]() for _ in range(4)]
    assert losses[-1] < losses[0]
    # With mean pooling our image tower has no class token and no position for it; the peers' towers keep both.
    unused = 2 * 64 if small.image_pooling == "mean" else 0
    assert calls["parameters"]() - count == unused


@pytest.mark.slow
def test_the_input_pipeline_is_compared_with_other_loaders(run, tmp_path):
    path = tmp_path / "input.json"
    done = run("bench", "input", "--size=32", "--source=48", "--batches=2", "--repeats=1", f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = {row["implementation"]: row for row in json.loads(path.read_text())["rows"]}
    installed = {
        name for name, packages in input_benchmark.PEERS.items() if all(map(importlib.util.find_spec, packages))
    }
    own = {*input_benchmark.VARIANTS, *input_benchmark.TEXTS, input_benchmark.DECODING}
    assert rows.keys() == own | {"Pillow in threads"} | installed
    for name, row in rows.items():
        assert row["per_second"] == pytest.approx(128 / row["seconds"])
        assert row["cores"] is None if name == "webdataset" else row["cores"] * row["per_core"] == pytest.approx(9000)
    per_gpu = [rows[name]["cores"] for name in (input_benchmark.ON_DEVICE, input_benchmark.AUGMENTED)]
    assert f"A host of 8 needs {8 * per_gpu[0]:.0f}, or {8 * per_gpu[1]:.0f} if captions" in done.stdout


@pytest.mark.slow
def test_a_second_start_compiles_nothing(run, tmp_path):
    path = tmp_path / "start.json"
    done = run("bench", "start", "--preset=tiny", "--repeats=1", f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = {row["start"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == {"imports", "cold", "compiled before"} and all(row["seconds"] > 0 for row in rows.values())
    assert rows["cold"]["programs"] > 0 and rows["compiled before"]["programs"] == 0


@pytest.mark.slow
def test_sigterm_also_ends_the_processes_that_a_benchmark_started(start):
    process = start("bench", "start", "--preset=tiny", "--repeats=1")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def training_processes() -> list[Path]:
        folders = [Path("/proc") / child for child in children.read_text().split()]
        return [folder for folder in folders if b"jaxclip.train\0" in (folder / "cmdline").read_bytes()]

    deadline = time.monotonic() + 120
    while not (training := training_processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert training and not training[0].exists()


@pytest.mark.slow
def test_searches_by_concurrent_clients_are_measured_and_exact(run, trained, shop, tmp_path):
    path, workdir = tmp_path / "search.json", tmp_path / "run"
    shutil.copytree(trained, workdir)
    sizes = ("--k=5", "--seconds=1", "--repeats=1")
    done = run("bench", "search", f"--workdir={workdir}", f"--gallery={shop}", *sizes, f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    peers = [search_benchmark.PEER] if all(map(importlib.util.find_spec, search_benchmark.PEER_PACKAGES)) else []
    assert [(row["clients"], row["implementation"]) for row in rows] == [
        (clients, name) for clients in search_benchmark.CLIENTS for name in ("jaxclip", *peers)
    ]
    for row in rows:
        assert row["exact"] == 1 and row["products"] == 60 and 0 < row["p50"] <= row["p99"]
        assert row["per_second"] > 0 and (row["ratio"] is not None) == bool(peers)


def test_the_search_benchmark_requires_a_workdir(capsys):
    from jaxclip import bench

    assert bench.main(["search"]) == 2 and "--workdir is missing" in capsys.readouterr().err
