"""Cross-attention as a re-ranker; and why fusing each picture with its own caption measures nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxclip.ranking import metrics, ranks
from jaxclip.reranking.cross_attention import CrossAttention, CrossAttentionConfig


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(quick_compilation):
    """Switches XLA's optimisations off: these networks are tiny, so compiling takes longer than running."""


CONFIG = CrossAttentionConfig(4, 8, 6, 8, 20.0, width=16, layers=2, heads=2)


def model(seed=0):
    return CrossAttention(CONFIG, rngs=nnx.Rngs(seed))


def tokens(seed, count, length, ends=False):
    random = np.random.default_rng(seed)
    found = random.normal(size=(count, length, 8)).astype(np.float32)
    if ends:
        found[np.arange(length) >= random.integers(2, length, size=(count, 1))] = 0
    return found


def pairs(queries=3, candidates=5):
    query = tokens(0, queries, 6, ends=True)
    images = tokens(1, queries * candidates, 4).reshape(queries, candidates, 4, 8)
    first = -np.sort(np.random.default_rng(2).normal(size=(queries, candidates)).astype(np.float32))
    return query, first, {"image_tokens": images}, {"image_tokens": np.ones((queries, candidates), bool)}


def perturbed(network, seed=5):
    graph, state = nnx.split(network)
    keys = iter(jax.random.split(jax.random.key(seed), 1000))
    return nnx.merge(graph, jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), state))


def test_the_default_shape_is_that_of_the_papers_block():
    built = CrossAttentionConfig(1, 1, 1, 1, 1.0)
    assert (built.layers, built.heads) == (6, 8)
    network = model()
    for start in (network.image_class, network.text_class):
        assert (np.asarray(start[...]) == 0).all()
    assert network.positions[...].shape == (2 + 4 + 6, 16)


def test_an_untrained_scorer_leaves_the_first_stages_scores_bit_for_bit():
    inputs = pairs()
    scores = np.asarray(model()(*inputs))
    assert (scores.view(np.uint32) == np.ascontiguousarray(inputs[1]).view(np.uint32)).all()


def test_a_score_depends_on_its_own_pair_only_and_on_the_order_of_its_tokens():
    query, first, features, present = pairs()
    network = perturbed(model())
    scores = np.asarray(network(query, first, features, present))
    changed = features["image_tokens"].copy()
    changed[1, 2] += 1
    again = np.array(network(query, first, {"image_tokens": changed}, present))
    assert abs(again[1, 2] - scores[1, 2]) > 1e-3
    again[1, 2] = scores[1, 2]
    np.testing.assert_allclose(again, scores, atol=1e-5)
    turned = features["image_tokens"][:, :, ::-1]
    assert np.abs(np.asarray(network(query, first, {"image_tokens": turned}, present)) - scores).max() > 1e-3


def test_the_padding_of_a_caption_is_not_read():
    query, first, features, present = pairs()
    network = perturbed(model())
    scores = np.asarray(network(query, first, features, present))
    inside = (query != 0).any(-1)
    image = features["image_tokens"].reshape(15, 4, 8)
    garbage = np.where(inside[..., None], query, 99.0).astype(np.float32)
    fused = [
        network.fuse(image, np.repeat(text, 5, axis=0), np.repeat(inside, 5, axis=0))[1] for text in (query, garbage)
    ]
    np.testing.assert_allclose(fused[0], fused[1], atol=1e-5)
    assert np.isfinite(scores).all()


def hit_at_1(texts, images):
    texts, images = (np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in (texts, images))
    order = np.arange(len(texts))
    relevance = ranks.Relevance.from_groups(order, order)
    return metrics.hit(ranks.ranks(texts, images, relevance).ranks, relevance.indptr, 1).mean()


@pytest.mark.parametrize("seed", [0, 1])
def test_fusing_each_picture_with_its_own_caption_retrieves_even_noise(seed):
    """Read literally, the paper fuses each picture with its own caption, then ranks by the cosine of the two results.

    Here captions and pictures are independent noise and the network is untrained, yet it beats chance.
    """
    count = 100
    images, texts = tokens(10 + seed, count, 4), tokens(20 + seed, count, 6)
    graph, state = nnx.split(perturbed(model(seed), seed))

    @jax.jit
    def fuse(images, texts):
        fused = nnx.merge(graph, state).fuse(images, texts, jnp.ones(texts.shape[:2], bool))
        return [part - part.mean(axis=0) for part in fused]

    of_images, of_texts = fuse(images, texts)
    assert hit_at_1(texts.mean(axis=1), images.mean(axis=1)) <= 3 / count  # chance is 1 / count
    assert hit_at_1(of_texts, of_images) >= 6 / count
    # A user's query is not the picture's own caption: fused with another one's caption, the advantage is gone.
    of_images, of_strangers = fuse(images, np.roll(texts, 1, axis=0))
    assert hit_at_1(np.roll(of_strangers, -1, axis=0), of_images) <= 3 / count


def test_gradients_reach_every_parameter_once_the_head_has_moved():
    query, first, features, present = pairs()
    graph, state = nnx.split(perturbed(model()))
    gradient = jax.grad(lambda s: nnx.merge(graph, s)(query, first, features, present)[:, 0].sum())(state)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    still = [jax.tree_util.keystr(path) for path, leaf in leaves if not float(jnp.abs(leaf).max()) > 0]
    assert all("logit_scale" in name for name in still), still
