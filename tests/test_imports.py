"""Training, ranking and benchmarks run without TensorFlow, and rooms import only from lower floors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxclip.pipeline.text import train_tokenizer

ROOT = Path(__file__).parents[1]

IMPORT_BLOCKER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "array_record", "tensorboard"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Absent())
"""

TRAINING = """
import jax, jax.numpy as jnp, numpy as np
from jaxclip.losses import contrastive
from jaxclip.models import encoders
from jaxclip.models.presets import PRESETS, clip_config
from jaxclip.models.weights import open_clip
from jaxclip.ranking import metrics, ranks, significance
from jaxclip.runtime import mesh
from jaxclip.config.schema import Optimizer
from jaxclip.towers.params import make_model
from jaxclip.training import optimizer, state, step

config = clip_config(PRESETS["tiny"], image_size=32, vocab_size=64, context_length=6, end_token=1,
                     mean=(0.5,) * 3, std=(0.25,) * 3)
graph, shapes = make_model(config)
settings = Optimizer(learning_rate=1e-3, warmup_steps=1, weight_decay=0.1, beta2=0.98, epsilon=1e-6, clip_norm=1.0)
schedule = optimizer.make_schedule(settings, 10)
adam = optimizer.make_optimizer(settings, schedule, shapes)
devices = mesh.make_mesh(-1, 1, 1)
random = np.random.default_rng(0)
batch = {"image": random.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
         "text": np.concatenate([random.integers(2, 64, (8, 5)), np.ones((8, 1), int)], axis=1).astype(np.int32),
         "group": np.arange(8, dtype=np.int32)}
with jax.set_mesh(devices):
    train_state = state.initial_state(config, adam, state.abstract_state(shapes, adam, devices), seed=0)
    loss = step.make_loss(graph, mask_groups=True, learned_temperature=True)
    train_step = jax.jit(step.make_step(loss, adam, schedule, seed=0))
    losses = []
    for _ in range(3):
        train_state, step_metrics = train_step(train_state, batch)
        losses.append(float(step_metrics["loss"]))
assert int(train_state.step) == 3 and np.isfinite(losses).all() and losses[2] < losses[0], losses
vectors = np.eye(8, dtype=np.float32)
ranking = ranks.ranks(vectors, vectors, ranks.Relevance.from_groups(np.arange(8), np.arange(8)), top_k=2)
assert (ranking.ranks == 1).all()
assert not {"tensorflow", "tensorflow_datasets", "array_record", "transformers"} & set(sys.modules)
"""

BENCHMARKING = """
from jaxclip.planning import fit
from jaxclip.benchmarks import device, device_parts, limited, loss, ranks, train_step

calls = train_step.ours(train_step.make_config(preset="tiny", batch=4, dtype="float32"))
assert calls["train step"]() > 0 and calls["images"]() and calls["texts"]()
parts = [part for part in device.PARTS if part.function.__name__ in ("step", "ranks")][-2:]
for part in parts:
    rows = list(device_parts.run(limited.name_of(part.function), part.sizes, part.toy))
    assert rows and not any("error" in row for row in rows), rows
assert len(parts) == 2 and "tensorflow" not in sys.modules
"""


def python(code):
    """Runs code in a process with one device and returns the completed process.

    XLA's optimisations are off: this code takes longer to compile than to run.
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_import_blocker_blocks_tensorflow():
    assert "tensorflow is not installed here" in python(IMPORT_BLOCKER + "import tensorflow").stderr


@pytest.mark.slow
@pytest.mark.parametrize("code", [TRAINING, BENCHMARKING], ids=["training", "benchmarking"])
def test_training_ranking_and_benchmarks_run_where_tensorflow_is_not_installed(code):
    done = python(IMPORT_BLOCKER + code)
    assert done.returncode == 0, done.stderr


def test_loading_the_tokenizer_of_a_run_does_not_import_pytorch(tmp_path):
    """AutoTokenizer of transformers imports PyTorch where it is installed, which takes seconds and half a gigabyte."""
    train_tokenizer(["a red shoe"], 300).save_pretrained(tmp_path)
    code = f"""
import pathlib, sys
from jaxclip.pipeline.text import load_tokenizer
assert load_tokenizer(pathlib.Path({str(tmp_path)!r}))("shoe")["input_ids"]
from jaxclip.evaluation import evaluator
from jaxclip.serving import open
from jaxclip.training import run
unwanted = {{"torch", "transformers.models.auto.tokenization_auto", "transformers.configuration_utils"}}
assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_jaxclip_imports_no_large_library():
    done = python("import sys, jaxclip; print(jaxclip.__version__, *{'jax', 'tensorflow', 'numpy'} & set(sys.modules))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [__import__("jaxclip").__version__]


def test_rooms_import_only_from_lower_floors():
    done = python("from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
