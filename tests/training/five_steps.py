"""Trains small models for five steps on any mesh. `train` does so in this process; the program is one of several:

    python five_steps.py COORDINATOR PROCESSES NUMBER FILE CASE:DATAxFSDPxTENSOR ...

Process 0 writes the losses, gradient norms and final parameters of each case to FILE (npz).
"""

import sys
from dataclasses import replace
from functools import partial

import jax
import numpy as np

from jaxclip.config.schema import Optimizer
from jaxclip.losses.objective import Objective
from jaxclip.models.lora import LoRAConfig
from jaxclip.models.presets import Preset, clip_config, with_execution
from jaxclip.runtime import distributed, mesh
from jaxclip.towers import sharding
from jaxclip.towers.params import make_model, replicated
from jaxclip.towers.trainable import EVERYTHING, make_trainable
from jaxclip.training.optimizer import make_optimizer, make_schedule
from jaxclip.training.state import abstract_state, initial_state
from jaxclip.training.step import compile_step, make_loss, make_step

STEPS, BATCH, CONTEXT, END = 5, 16, 12, 255
CONFIG = with_execution(
    clip_config(
        Preset(16, (64, 2, 2), (64, 2, 2), 64, "conv", "mean", "mean", "gelu_tanh"),
        image_size=32,
        vocab_size=256,
        context_length=CONTEXT,
        end_token=END,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    ),
    dropout=0.1,
    stochastic_depth=0.1,
    execution="scan",
)
# Epsilon exceeds the gradients' rounding errors, which differ between meshes and which Adam would turn into full steps.
ADAM = Optimizer(learning_rate=1e-3, warmup_steps=2, weight_decay=0.1, beta2=0.98, epsilon=1e-4, clip_norm=1.0)
SCHEDULE = make_schedule(ADAM, STEPS)
OBJECTIVES = {
    "dense": Objective(implementation="dense"),
    "tiled": Objective(implementation="tiled", tile=1),
    "incorrect": Objective("incorrect_pairs", "dense", info_nce=0.5),
    "adapters": Objective(implementation="dense"),
    "muon": Objective(implementation="dense"),
}
CASES = (*OBJECTIVES, "reranker")


def batches():
    """Yields the batch of each step on the host: pictures, texts, groups, and partners for incorrect pairs."""
    rng = np.random.default_rng(0)

    def texts():
        tokens = rng.integers(0, END, (BATCH, CONTEXT), dtype=np.int32)
        tokens[np.arange(BATCH), rng.integers(3, CONTEXT, BATCH)] = END
        return tokens

    for _ in range(STEPS):
        yield {
            "image": rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8),
            "text": texts(),
            "group": rng.integers(0, 12, BATCH, dtype=np.int32),
            "incorrect_text": texts(),
            "similarity": rng.uniform(-1, 1, BATCH).astype(np.float32),
            "has_incorrect": rng.random(BATCH) < 0.8,
        }


def adapters():
    """Returns the configuration, graph and shapes of towers with adapters, and their trainable parameters."""
    config = replace(CONFIG, lora=LoRAConfig(4, 8.0, 0.1, "/blocks/"))
    graph, shapes = make_model(config)
    return config, graph, shapes, make_trainable(shapes, (("/lora/", 1.0), ("text/.*1/mlp_out", 0.5), ("", 0.0)))


def _towers(case, device_mesh):
    """Returns the step, the abstract state, a function that makes the initial state, the host batches and no tables."""
    config, graph, shapes, trainable = adapters() if case == "adapters" else (CONFIG, *make_model(CONFIG), EVERYTHING)
    settings = replace(ADAM, name="muon" if case == "muon" else "adamw")
    optimizer = make_optimizer(settings, SCHEDULE, shapes, trainable)
    abstract = abstract_state(shapes, optimizer, device_mesh, trainable, ema=True)
    loss = make_loss(graph, mask_groups=True, learned_temperature=True, objective=OBJECTIVES[case])
    step = make_step(loss, optimizer, SCHEDULE, trainable, seed=3, ema=0.5)
    names = ["image", "text", "group"] + ["incorrect_text", "similarity", "has_incorrect"] * (case == "incorrect")
    host_batches = [{name: batch[name] for name in names} for batch in batches()]
    make_state = partial(initial_state, config, optimizer, abstract, trainable, seed=7)
    return step, abstract, make_state, host_batches, {}


def _reranker(device_mesh):
    """Returns what `_towers` does, for a re-ranker, with the tables that are replicated on every device."""
    from jaxclip.reranking import reranker as reranking
    from jaxclip.reranking.networks import PRESETS, RerankerConfig

    config = RerankerConfig(16, (("image", 16), ("colour", 5)), 20.0, hidden=32, matching=16, dropout=0.1)
    graph, shapes = make_model(config, PRESETS["gated"])
    optimizer = make_optimizer(ADAM, SCHEDULE, shapes)
    abstract = abstract_state(shapes, optimizer, device_mesh)
    model = reranking.Reranker(
        config, ("image", "colour"), PRESETS["gated"], graph, abstract.params, device_mesh, EVERYTHING
    )
    rng, (lists, items, depth) = np.random.default_rng(1), (40, 60, 8)
    tables = {
        "query": rng.normal(size=(lists, 16)).astype(np.float32),
        "items": rng.integers(0, items, (lists, depth), dtype=np.int32),
        "first_scores": rng.uniform(0, 1, (lists, depth)).astype(np.float32),
        "relevant": np.arange(depth) == rng.integers(0, depth, (lists, 1)),
        "features": {name: rng.normal(size=(items, size)).astype(np.float32) for name, size in config.features},
        "present": {name: rng.random(items) < 0.9 for name, _ in config.features},
    }
    loss = reranking.make_loss(model, loss="softmax", negatives="top", sampled=0)
    step = make_step(loss, optimizer, SCHEDULE, EVERYTHING, seed=3)
    host_batches = [{"rows": rows} for rows in reranking.batch_rows(lists, BATCH, 0, range(STEPS))]
    make_state = partial(initial_state, config, optimizer, abstract, seed=7, model=PRESETS["gated"])
    return step, abstract, make_state, host_batches, tables


def train(case, sizes):
    """Returns losses and gradient norms (STEPS, 2), the final state on the host and the number of compilations."""
    device_mesh = mesh.make_mesh(*sizes, jax.devices("cpu")[: int(np.prod(sizes))])
    split, whole = mesh.batch_sharding(device_mesh), replicated(device_mesh)
    make_case = _reranker if case == "reranker" else partial(_towers, case)
    step, abstract, make_state, host_batches, tables = make_case(device_mesh)
    process_rows = mesh.process_rows(split, BATCH)
    tables = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, whole, x.__getitem__), tables)
    compilations = []

    def count(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    mesh.open_collectives(device_mesh)
    with jax.set_mesh(device_mesh):
        state = make_state()
        place = lambda x: mesh.place_rows(split, BATCH, x[process_rows])  # noqa: E731
        placed = [{**jax.tree.map(place, batch), **tables} for batch in host_batches]
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed[0])
        jax.monitoring.register_event_duration_secs_listener(count)
        try:
            compiled = compile_step(step, abstract, shapes)
            figures = []
            for batch in placed:
                state, metrics = compiled(state, batch)
                figures.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
        finally:
            jax.monitoring.unregister_event_duration_listener(count)
        for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
        state = jax.jit(lambda state: state, out_shardings=whole)(state)
    return np.asarray(figures), jax.device_get(state), len(compilations)


def main(coordinator, processes, number, file, *jobs):
    """Runs this process's part of the jobs (CASE:DATAxFSDPxTENSOR) and, in process 0, writes their results."""
    jax.config.update("jax_disable_most_optimizations", True)
    distributed.join(coordinator, int(processes), int(number))
    results = {}
    for job in jobs:
        case, sizes = job.split(":")
        figures, state, _ = train(case, tuple(map(int, sizes.split("x"))))
        leaves = dict(zip(jax.tree.leaves(sharding.names(state.params)), jax.tree.leaves(state.params), strict=True))
        results |= {f"{job}/figures": figures, **{f"{job}/{name}": leaf for name, leaf in leaves.items()}}
    if distributed.is_primary():
        np.savez(file, **results)
    distributed.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
