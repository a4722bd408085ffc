"""Token embeddings have the gradient of a plain look-up, summed in float32, whichever ids captions share."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxclip.models import clip
from jaxclip.models.clip import TextConfig, TextTower
from jaxclip.models.embedding import embed_tokens
from jaxclip.models.transformer import TransformerConfig
from jaxclip.runtime import compiler, mesh

VOCABULARY, END, WIDTH, LENGTH = 40, 39, 16, 12
ACCELERATOR = tuple(row for row in compiler.TABLE if row.target != "sum_by_id")
"""The table without the row that chooses the CPU's form of the sum."""


@pytest.fixture(params=["accelerator", "cpu"])
def form(request, monkeypatch):
    """Selects one of the two ways in which gradients of tokens are summed."""
    if request.param == "accelerator":
        monkeypatch.setattr(compiler, "TABLE", ACCELERATOR)


def captions(padding, count=8):
    """Returns captions of different lengths, one of which fills the context: start, words, end, then `padding`."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, 6, (count, LENGTH))
    lengths = np.linspace(2, LENGTH - 1, count).astype(int)
    tokens[:, 0] = 38
    tokens[np.arange(LENGTH) >= lengths[:, None]] = padding
    tokens[np.arange(count), lengths] = END
    return random.permutation(tokens).astype(np.int32)


def plain(table, tokens, *, end_token, reached, dtype):
    return jnp.take(table, tokens, axis=0).astype(dtype)


@pytest.mark.parametrize("pooling", ["end", "last", "mean"])
@pytest.mark.parametrize("padding", [END, 0])
def test_every_poolings_gradient_equals_that_of_the_plain_look_up(monkeypatch, pooling, padding):
    monkeypatch.setattr(compiler, "TABLE", ACCELERATOR)
    blocks = TransformerConfig(WIDTH, 1, 2, execution="scan")
    graph, params = nnx.split(TextTower(TextConfig(VOCABULARY, LENGTH, END, blocks, pooling), 8, rngs=nnx.Rngs(0)))
    tokens, weights = captions(padding), np.random.default_rng(1).normal(size=(8, 8))

    def gradient():
        loss = jax.jit(jax.grad(lambda params: (nnx.merge(graph, params)(tokens) * weights).sum()))
        return loss(params)["token_embedding"]["embedding"][...]

    ours = gradient()
    monkeypatch.setattr(clip, "embed_tokens", plain)
    expected = gradient()
    np.testing.assert_allclose(ours, expected, atol=1e-6 * np.abs(expected).max(), rtol=0)
    reached = sorted(set(tokens.ravel()) - ({0} if pooling != "last" else set()))
    assert np.flatnonzero(np.abs(expected).max(axis=1)).tolist() == reached


def table_gradient(tokens, slope, **options):
    table = jnp.asarray(np.random.default_rng(3).normal(size=(VOCABULARY, slope.shape[-1])), jnp.float32)
    look_up, pull = jax.vjp(
        lambda table: embed_tokens(table, tokens, end_token=END, dtype=slope.dtype, **options), table
    )
    np.testing.assert_array_equal(look_up, table.astype(slope.dtype)[tokens])
    return pull(slope)[0]


def exact_gradient(tokens, slope):
    total = np.zeros((VOCABULARY, slope.shape[-1]))
    np.add.at(total, np.asarray(tokens), np.asarray(slope, np.float64))
    return total


@pytest.mark.parametrize("first", [[38, 1, END, END], [38, 1, 2, END], [3, 3, END, 3], [3, 1, 2, 5]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("form")
def test_sums_over_many_captions_are_not_rounded_to_bfloat16(first, dtype):
    random = np.random.default_rng(2)
    tokens = np.concatenate([[first], random.integers(0, VOCABULARY, (2000, 4))]).astype(np.int32)
    tokens[1:1500, 0], tokens[1:1000, 3] = 38, END
    slope = jnp.asarray(random.normal(1, 1, size=(2001, 4, 8)), dtype)
    ours, expected = table_gradient(tokens, slope), exact_gradient(tokens, slope)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, atol=2e-6 * expected.max(), rtol=0)


@pytest.mark.usefixtures("form")
def test_what_is_not_reached_is_not_added():
    tokens = captions(END)
    inside = np.arange(LENGTH) <= np.argmax(tokens == END, axis=1)[:, None]
    slope = jnp.ones((*tokens.shape, 3))
    ours = table_gradient(tokens, slope, reached=jnp.asarray(inside))
    np.testing.assert_array_equal(ours, exact_gradient(tokens, slope * inside[..., None]))
    assert (ours[END] == len(tokens)).all()


def test_sharded_tables_have_the_gradient_of_one_device_and_no_captions_are_gathered(monkeypatch):
    monkeypatch.setattr(compiler, "TABLE", ACCELERATOR)
    devices = mesh.make_mesh(2, 2, 2)
    rows, split = PartitionSpec(("data", "fsdp")), PartitionSpec("tensor", "fsdp")
    tokens = np.tile(captions(END), (8, 1))
    slope = np.random.default_rng(4).normal(size=(*tokens.shape, 32)).astype(np.float32)

    def gradient(table, tokens, slope):
        return jax.vjp(lambda table: embed_tokens(table, tokens, end_token=END, dtype="bfloat16"), table)[1](slope)[0]

    arguments = jnp.zeros((VOCABULARY, 32)), tokens, slope.astype(jnp.bfloat16)
    placed = [
        jax.device_put(x, NamedSharding(devices, spec)) for x, spec in zip(arguments, (split, rows, rows), strict=True)
    ]
    with jax.set_mesh(devices):
        compiled = jax.jit(gradient, out_shardings=NamedSharding(devices, split)).lower(*placed).compile()
    np.testing.assert_allclose(compiled(*placed), exact_gradient(tokens, arguments[2]), rtol=1e-5, atol=1e-5)
    collectives = re.findall(
        r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", compiled.as_text()
    )
    sizes = [np.prod([int(side) for side in shape.split(",") if side]) for shape in collectives]
    assert max(sizes, default=0) <= tokens.size, "gradients of captions must not leave their device"
