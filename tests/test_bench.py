"""The bench command measures what it names and writes what it shows."""

import importlib.util
import json

import pytest

PEERS = {"dense", "tiled", "checkpointed strips"}


@pytest.mark.slow
def test_the_losses_are_measured_side_by_side(run, tmp_path):
    path = tmp_path / "loss.json"
    done = run("bench", "loss", "--rows=512", "--dimension=32", "--repeats=1", "--tile=128", f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = {row["implementation"]: row for row in json.loads(path.read_text())["rows"]}
    peers = PEERS | ({"open_clip ClipLoss"} if importlib.util.find_spec("open_clip") else set())
    assert rows.keys() == peers
    for name, row in rows.items():
        assert name in done.stdout and row["seconds"] > 0 and row["flops_per_second"] > 0
    assert rows["dense"]["time_ratio"] == 1.0
    assert rows["tiled"]["temporaries"] < rows["dense"]["temporaries"]
    assert rows["dense"]["temporaries"] >= 4 * 512 * 512


@pytest.mark.slow
def test_ranks_are_measured_beside_what_is_installed(run, tmp_path):
    path = tmp_path / "ranks.json"
    done = run("bench", "ranks", "--items=400", f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = {row.pop("implementation"): row for row in json.loads(path.read_text())["rows"]}
    assert {"both ways, top 20", "one way, top 20", "one way, bfloat16", "numpy sort, small", "memory"} <= rows.keys()
    assert ("two searches of faiss, top 20" in rows) == (importlib.util.find_spec("faiss") is not None)
    assert all(row["seconds"] > 0 for name, row in rows.items() if name != "memory")
    assert rows["one way, bfloat16"]["ranks changed"] < 0.1 and rows["memory"]["items"] == 400


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["los"], "invalid choice: 'los'"),
        (["loss", "--rows=0"], "0 must be at least 1"),
        (["loss", "--colour"], "unrecognized arguments: --colour"),
        (["loss", "--json=/nowhere/at/all.json"], "/nowhere/at is no folder"),
    ],
)
def test_a_wrong_command_line_is_told(capsys, arguments, problem):
    from jaxclip import bench

    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and problem in capsys.readouterr().err


def test_strips_are_the_loss_too():
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxclip.losses.contrastive import info_nce
    from jaxclip.training.benchmarks.loss import STRIP, by_strips

    images, texts = np.random.default_rng(0).normal(size=(2, 2 * STRIP, 8)).astype(np.float32)
    value, slope = jax.value_and_grad(by_strips)(images, texts, jnp.float32(2.0))
    expected, right = jax.value_and_grad(lambda *args: info_nce(*args)[0])(images, texts, jnp.float32(2.0))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(slope, right, atol=1e-5)
