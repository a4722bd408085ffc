"""Every form of counting and selecting equals a sort in float64; the plain form has no loop of unknown length."""

import importlib.util
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxclip.planning import hlo
from jaxclip.ranking import cpu_selection, gpu_selection, kernel, selection, sweep
from jaxclip.ranking.index import NearestNeighbours
from jaxclip.ranking.layout import TILES
from jaxclip.ranking.ranks import both_ways, make_mesh, ranks
from jaxclip.ranking.relevance import Relevance
from jaxclip.runtime import compiler

SIDES = 64, 128
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, np.inf, -np.inf, np.nan])


@pytest.fixture(autouse=True)
def compile_quickly(quick_compilation):
    """Switches XLA's optimisations off."""


@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 1), (64, 64), (1001, 3), (1001, 40), (4096, 2)])
def test_the_best_by_groups_equal_a_stable_sort(n, k):
    random = np.random.default_rng(0)
    top_k = jax.jit(partial(gpu_selection.top_k, k=k))
    for numbers in ([1.0], [0.0, 1.0], [-np.inf, 0.0, np.inf], np.arange(9.0), random.normal(size=3 * n)):
        scores = random.choice(numbers, (2, 3, n)).astype(np.float32)
        values, places = top_k(scores)
        order = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
        np.testing.assert_array_equal(places, order)
        np.testing.assert_array_equal(values, np.take_along_axis(scores, order, axis=-1))


@partial(jax.jit, static_argnames=("form", "axis", "backend"))
def select(tiles, real, limits, widths, best, *, form, axis, backend):
    """Returns the counts and the best of two tiles, as `kernel.make_visit` computes them."""
    del backend  # tells the programs for GPUs and TPUs apart
    counts, size = 0, SIDES[axis]
    order = (0, 1) if form is cpu_selection else (1, 0)  # the plain form takes tiles in any order
    for number in order:
        tile, shown = tiles[number], real[number]
        scores = form.mask(kernel.keys(tile, finite=False), shown, ~shown.all())
        thresholds = selection.Thresholds(limits, widths)
        more, best = form.count_and_select(
            scores, thresholds, best, jnp.bool(number == order[0]), number * size, axis=axis
        )
        counts += more
    return counts, best


@pytest.mark.parametrize(
    ("backend", "axis", "k", "places"),
    [
        ("cpu", 1, 4, 2),
        ("tpu", 0, 4, 1),
        ("tpu", 1, 1, 1),
        ("gpu", 0, 0, 1),
        ("gpu", 1, 0, 16),
        ("gpu", 0, 4, 1),
        ("gpu", 1, 4, 2),
        ("gpu", 0, 1, 32),
        ("gpu", 1, 8, 1),
    ],
)
def test_counts_and_the_best_of_two_tiles_equal_a_sort_in_float64(backend, axis, k, places):
    form = cpu_selection if backend == "cpu" else selection
    with compiler.compiling_for(backend):

        @settings(max_examples=15, deadline=None)
        @given(hnp.arrays(np.float32, (2, *SIDES), elements=NUMBERS, fill=NUMBERS), st.integers(k, SIDES[axis]))
        def equals_a_sort(tiles, size):
            lines = SIDES[1 - axis]
            real = np.arange(2 * SIDES[axis]).reshape(2, -1) < SIDES[axis] + size
            real = np.broadcast_to(np.expand_dims(real, 2 - axis), tiles.shape)
            scores = np.concatenate(tiles, axis=axis).astype(np.float64)
            scores = (scores if axis else scores.T)[:, : SIDES[axis] + size]  # (lines, items)
            scores = np.where(np.isnan(scores), kernel.NAN, np.maximum(scores, kernel.MINUS_INFINITY))
            width = max(1, places - 1)
            limits = np.full((places, lines), np.inf, np.float32)
            limits[:width] = scores[:, :width].T
            best = np.full((k, lines), -np.inf, np.float32), np.full((k, lines), selection.NOWHERE)
            counts, (values, items) = select(
                tiles, real, limits, np.int32(width), best, form=form, axis=axis, backend=backend
            )
            at_or_above = (scores[None] >= limits[:width, :, None]).sum(axis=2)
            np.testing.assert_array_equal(counts[:width], at_or_above)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            np.testing.assert_array_equal(values.T, np.take_along_axis(scores, order, axis=1).astype(np.float32))
            np.testing.assert_array_equal(items.T, order)

        equals_a_sort()


def compiled_visit(backend, *, top, places):
    """Returns the HLO text of the rank kernel's form for a back end, compiled for a CPU."""

    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    rows, columns, real = 64, 128, jnp.float32
    mesh = jax.make_mesh((1, 1), kernel.AXES, axis_types=make_mesh().axis_types, devices=jax.devices()[:1])
    state = shape(1, 3, places, columns), shape(1, 3, top, columns, dtype=real), shape(1, 3, top, columns)
    thresholds = (
        selection.Thresholds(shape(1, places, rows, dtype=real), shape()),
        selection.Thresholds(shape(3, places, columns, dtype=real), shape(3)),
    )
    sides = shape(1, rows, 16, dtype=real), shape(3, columns, 16, dtype=real)
    with compiler.compiling_for(backend):
        visit = kernel.make_visit(mesh, blocks=2, ks=(top, top), back=True, finite=False)
        return visit.lower(shape(), shape(2), *sides, *thresholds, shape(1, 3, 64, 2), state).compile().as_text()


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
@pytest.mark.parametrize(("top", "places"), [(0, 32), (4, 1)])
def test_the_form_for_accelerators_has_no_loop_of_unknown_length_and_no_conditional(backend, top, places):
    executed = list(hlo.parse(compiled_visit(backend, top=top, places=places)).executed())
    assert not any(instruction.opcode == "conditional" for instruction, _ in executed)
    assert {times for instruction, times in executed if instruction.opcode == "dot"} <= {3}


def test_the_form_for_cpus_has_loops_of_unknown_length():
    with pytest.raises(ValueError, match="how often the loop"):
        list(hlo.parse(compiled_visit("cpu", top=0, places=1)).executed())


# Compiles the rank kernel for 32,768 queries and items on one absent device, and prints the bytes that one block moves,
# divided by those of its scores, and the seconds of its products and of its memory traffic.
COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxclip.planning.cost import program_cost
from jaxclip.planning.topologies import open_topology
from jaxclip.ranking import kernel
from jaxclip.ranking.layout import TILES
from jaxclip.ranking.selection import Thresholds
from jaxclip.runtime import compiler
from jaxclip.runtime.mesh import mesh_of

topology = open_topology("TOPOLOGY")
top = TOP
devices, tile, width = topology.devices[:1], TILES[topology.backend], 512
mesh, blocks = mesh_of({"queries": 1, "gallery": 1}, devices), 2**15 // tile
spec = {"": P(), "q": P("queries"), "g": P("gallery"), "qg": P("queries", "gallery")}

def shape(axes, *sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec[axes]))

real = jnp.float32
lists = (1, jnp.int32), (top, real), (top, jnp.int32)
state = [shape("qg", 1, blocks, count, tile, dtype=dtype) for count, dtype in lists]
thresholds = [
    Thresholds(shape("q", 1, 1, tile, dtype=real), shape("")),
    Thresholds(shape("g", blocks, 1, tile, dtype=real), shape("g", blocks)),
]
sides = shape("q", 1, tile, width, dtype=real), shape("g", blocks, tile, width, dtype=real)
with compiler.compiling_for(topology.backend, devices), jax.set_mesh(mesh):
    visit = kernel.make_visit(mesh, blocks=blocks, ks=(top, top), back=True, finite=True)
    traced = visit.trace(shape(""), shape("", 2), *sides, *thresholds, shape("qg", 1, blocks, 64, 2), tuple(state))
    compiled = traced.lower(lowering_platforms=(topology.platform,)).compile(compiler_options=dict(topology.options))
cost = program_cost(compiled.as_text(), devices, topology.chip)
print(json.dumps([cost.traffic / (4 * blocks * tile**2), cost.compute, cost.memory]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "module", "top", "passes"),
    [
        ("h200:1", "jax_plugins.xla_cuda13", 0, 5),
        ("h200:1", "jax_plugins.xla_cuda13", 20, 10),
        ("v5e:2x2", "libtpu", 0, 1),
        ("v5e:2x2", "libtpu", 20, 1),
    ],
)
def test_scores_cross_the_memory_a_few_times_and_in_less_time_than_their_product(
    run_for_tpus, topology, module, top, passes
):
    if not installed(module):
        pytest.skip(f"{module} is not installed")
    printed = run_for_tpus(COMPILE.replace("TOPOLOGY", topology).replace("= TOP\n", f"= {top}\n"))
    crossings, compute, memory = json.loads(printed.splitlines()[-1])
    assert crossings < passes and memory < compute


def installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package of the module
        return False


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_each_block_is_one_program_started_before_the_block_before_it_is_fetched(monkeypatch, backend):
    random, events = np.random.default_rng(0), []
    fetch, visit, scores_at = sweep._fetch, kernel.make_visit, kernel.scores_at

    def logged(name, function):
        return lambda *args, **options: (events.append(name), function(*args, **options))[1]

    monkeypatch.setattr(sweep, "_fetch", logged("fetch", fetch))
    monkeypatch.setattr(kernel, "make_visit", lambda *args, **options: logged("start", visit(*args, **options)))
    monkeypatch.setattr(kernel, "scores_at", logged("initial", scores_at))
    queries, gallery = random.integers(-3, 4, (2, 500, 4)).astype(np.float32)
    mesh = jax.make_mesh((1, 1), kernel.AXES, axis_types=make_mesh().axis_types, devices=jax.devices()[:1])
    with compiler.compiling_for(backend):
        both_ways(queries, gallery, Relevance.from_groups(range(500), range(500)), tile=128, mesh=mesh)
    # Four blocks of 128 queries, each with its pairs in one tile; then the columns' state.
    initial = 2 if backend == "cpu" else 4
    assert events == ["initial"] * initial + ["start", *["start", "fetch"] * 3, "fetch", "fetch"]


def test_the_default_tile_is_that_of_the_back_end(monkeypatch):
    tiles = []

    def stop(layouts, *_):
        tiles.extend(layout.max_tile for layout in layouts)
        raise InterruptedError

    monkeypatch.setattr("jaxclip.ranking.ranks.initial_scores", stop)
    for backend in TILES:
        with compiler.compiling_for(backend), pytest.raises(InterruptedError):
            ranks(np.ones((2, 3)), np.ones((2, 3)), Relevance.from_groups([0, 1], [0, 1]))
    assert tiles == [tile for tile in TILES.values() for _ in range(2)]


@pytest.mark.parametrize("devices", [1, 8])
def test_nearest_neighbours_with_ties_on_gpus_equal_a_stable_sort(devices):
    random = np.random.default_rng(1)
    gallery, queries = (random.integers(-2, 3, (size, 3)).astype(np.float32) for size in (997, 5))
    with compiler.compiling_for("gpu"):
        _, rows = NearestNeighbours(gallery, max_k=30, devices=jax.devices()[:devices])(queries)
    np.testing.assert_array_equal(rows, np.argsort(-(queries @ gallery.T), axis=1, kind="stable")[:, :30])
