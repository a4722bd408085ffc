"""Untrained re-rankers keep the first stage's order, missing features add nothing, `Paper` is the paper's network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxclip.reranking.networks import HIDDEN, Gated, Paper, RerankerConfig


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(quick_compilation):
    """Switches XLA's optimisations off: these networks are tiny, so compiling takes longer than running."""


QUERIES, CANDIDATES, WIDTH = 6, 20, 16
SIZES = {"hubness": 3, "image": WIDTH, "crop": WIDTH, "colour": 45, "geometry": 6}


@pytest.fixture
def inputs():
    random = np.random.default_rng(0)
    query, first = random.normal(size=(QUERIES, WIDTH)), np.sort(random.normal(size=(QUERIES, CANDIDATES)))[:, ::-1]
    features = {name: random.normal(size=(QUERIES, CANDIDATES, size)) for name, size in SIZES.items()}
    present = {name: random.random((QUERIES, CANDIDATES)) < 0.8 for name in SIZES}
    present["hubness"][:] = True
    return jax.tree.map(lambda x: x if x.dtype == bool else x.astype(np.float32), (query, first, features, present))


def gated(trained):
    config = RerankerConfig(WIDTH, tuple(SIZES.items()), 20.0, hidden=32, matching=8)
    model = Gated(config, rngs=nnx.Rngs(0))
    if trained:
        graph, state = nnx.split(model)
        keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state))))
        model = nnx.merge(graph, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), state))
    return model


def test_an_untrained_gated_reranker_gives_the_first_stages_scores_bit_for_bit(inputs):
    _, first, _, _ = inputs
    for rng in (None, jax.random.key(0)):
        scores = np.asarray(gated(False)(*inputs, rng=rng))
        assert scores.dtype == np.float32
        assert (scores.view(np.uint32) == np.ascontiguousarray(first).view(np.uint32)).all()
    assert np.abs(np.asarray(gated(True)(*inputs)) - first).max() > 0.01


def test_an_untrained_gated_reranker_has_a_gradient_that_moves_it(inputs):
    graph, state = nnx.split(gated(False))
    gradient = jax.grad(lambda state: nnx.merge(graph, state)(*inputs)[:, 0].sum())(state)
    assert all(np.abs(gradient["matches"][name]["out"]["kernel"][...]).max() > 0 for name in SIZES)


def test_a_missing_feature_adds_nothing_whatever_its_values(inputs):
    query, first, features, present = inputs
    model = gated(True)
    scores = np.asarray(model(query, first, features, present))
    garbage = {name: np.where(present[name][..., None], x, 1e3).astype(np.float32) for name, x in features.items()}
    np.testing.assert_array_equal(model(query, first, garbage, present), scores)
    assert np.abs(np.asarray(model(query, first, garbage, jax.tree.map(np.ones_like, present))) - scores).max() > 0.1
    nothing = jax.tree.map(np.zeros_like, present)
    np.testing.assert_array_equal(model(query, first, features, nothing), first)


def test_what_a_feature_adds_is_centred_over_the_candidates_that_have_it(inputs):
    query, first, features, present = inputs
    only = {name: has if name == "crop" else np.zeros_like(has) for name, has in present.items()}
    added = np.asarray(gated(True)(query, first, features, only)) - first
    assert (added[~present["crop"]] == 0).all()
    np.testing.assert_allclose(added.sum(axis=1), 0, atol=1e-4)


def test_gates_depend_on_the_query_and_lie_between_0_and_2(inputs):
    query, first, features, present = inputs
    untrained, nothing = gated(False).added(query, features, present)
    assert np.asarray(untrained).tolist() == np.ones((QUERIES, len(SIZES))).tolist() and not np.any(nothing)
    gates, added = map(np.asarray, gated(True).added(query, features, present))
    np.testing.assert_allclose(first + added.sum(axis=1), gated(True)(*inputs), atol=1e-6)
    assert ((gates > 0) & (gates < 2)).all() and gates.std(axis=0).min() > 0.01


def paper(**options):
    sizes = (("crop", WIDTH), ("colour_embedding", WIDTH))
    return Paper(RerankerConfig(WIDTH, sizes, 20.0, dropout=0.5, **options), rngs=nnx.Rngs(0))


@pytest.fixture
def papers_inputs(inputs):
    query, first, features, present = inputs
    known = {"crop": features["crop"], "colour_embedding": features["image"]}
    return query, first, known, {"crop": present["crop"], "colour_embedding": np.ones_like(present["crop"])}


@pytest.mark.parametrize(("combine", "parts"), [("add", 2), ("concatenate", 3)])
def test_the_papers_network_has_the_papers_layers_and_inputs(papers_inputs, combine, parts):
    model = paper(combine=combine)
    kernels = [np.asarray(layer.kernel[...]) for layer in model.layers]
    assert [kernel.shape for kernel in kernels] == [(WIDTH * parts, 512), (512, 256), (256, 64)]
    for kernel in kernels:  # Kaiming uniform
        bound = np.sqrt(6 / kernel.shape[0])
        assert np.abs(kernel).max() <= bound and np.abs(kernel).max() > 0.95 * bound
    query, _, features, present = papers_inputs
    crop, colour = np.where(present["crop"][..., None], features["crop"], 0), features["colour_embedding"]
    x = np.broadcast_to(query[:, None], crop.shape)
    x = np.concatenate([x, crop + colour] if combine == "add" else [x, crop, colour], axis=-1)
    for layer, kernel in zip(model.layers, kernels, strict=True):
        x = np.maximum(x @ kernel + np.asarray(layer.bias[...]), 0)
    expected = (x @ np.asarray(model.out.kernel[...]))[..., 0]
    np.testing.assert_allclose(model(*papers_inputs), expected, atol=1e-4)


def test_the_papers_network_does_not_see_the_first_stages_score(papers_inputs):
    query, first, *rest = papers_inputs
    np.testing.assert_array_equal(paper()(query, first, *rest), paper()(query, -first, *rest))


def test_batch_norm_normalises_by_the_batch_in_training_and_by_running_statistics_after(papers_inputs):
    model = paper(batch_norm=True)
    _, statistics = model.train(*papers_inputs, rng=jax.random.key(0))
    means, variances = np.split(np.asarray(statistics), 2)
    assert len(means) == sum(HIDDEN) and np.abs(means).max() > 0.01 and np.abs(variances - 1).max() > 0.01
    before = np.asarray(model(*papers_inputs))
    model.statistics[...] = jnp.asarray(statistics)
    assert np.abs(np.asarray(model(*papers_inputs)) - before).max() > 1e-3
