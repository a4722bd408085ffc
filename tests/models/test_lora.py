"""Adapters change no output at first, then add their product, and can be merged into the kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxclip.errors import UserError
from jaxclip.models.clip import CLIP, CLIPConfig, ImageConfig, TextConfig
from jaxclip.models.lora import LoRAConfig, merge
from jaxclip.models.transformer import TransformerConfig

END = 9
ALL = "blocks|projection"


def config_of(lora=None, execution="unroll"):
    blocks = TransformerConfig(width=32, layers=2, heads=2, execution=execution)
    return CLIPConfig(ImageConfig(32, 8, blocks), TextConfig(10, 8, END, blocks), embedding=24, lora=lora)


@functools.cache
def parameters(targets=None):
    lora = None if targets is None else LoRAConfig(3, 6.0, 0.0, targets)
    return nnx.to_pure_dict(nnx.state(CLIP(config_of(lora), rngs=nnx.Rngs(0))))


def trained(params):
    """Returns the parameters with adapters whose B is not zero."""
    rng = np.random.default_rng(0)
    flat = flatten_dict(params)
    grown = {p: jnp.asarray(rng.normal(size=v.shape) * 0.1, v.dtype) if p[-1] == "b" else v for p, v in flat.items()}
    return unflatten_dict(grown)


def run(params, lora=None, *, rng=None, execution="unroll"):
    graph, _ = nnx.split(nnx.eval_shape(lambda: CLIP(config_of(lora, execution), rngs=nnx.Rngs(0))))
    pictures = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    tokens = np.random.default_rng(1).integers(0, 10, (4, 8)).astype(np.int32)
    tokens[:, -1] = END
    embeddings = jax.jit(lambda params: nnx.merge(graph, params)(pictures, tokens, rng=rng))(params)
    return np.asarray(embeddings.image), np.asarray(embeddings.text)


def without_adapters(params):
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items() if "lora" not in path})


def adapted(params):
    return {"/".join(path[:-2]) for path in flatten_dict(params) if path[-2:] == ("lora", "a")}


@pytest.mark.parametrize("execution", ["unroll", "scan"])
def test_new_adapters_change_no_bit_of_the_outputs(execution):
    params = parameters(ALL)
    assert len(adapted(params)) == 2 * 5 + 1  # five linear maps per tower, and the stem's projection
    jax.tree.map(np.testing.assert_array_equal, without_adapters(params), parameters())
    for adapted_output, plain in zip(
        run(params, LoRAConfig(3, 6.0, 0.0, ALL), execution=execution),
        run(parameters(), execution=execution),
        strict=True,
    ):
        np.testing.assert_array_equal(adapted_output, plain)


def test_an_adapter_adds_its_scaled_product():
    """Compares with kernels to which the product is added by einsum, for all layers of a stack."""
    lora = LoRAConfig(3, 6.0, 0.0, "attention/(qkv|out)")
    params = trained(parameters(lora.targets))
    expected = flatten_dict(without_adapters(params))
    letters = {"qkv": "lwr,lrchd->lwchd", "out": "lhdr,lrw->lhdw"}
    for path in adapted(params):
        *parents, kind = path.split("/")
        leaves = flatten_dict(params)
        a, b = (leaves[(*parents, kind, "lora", name)] for name in "ab")
        expected[(*parents, kind, "kernel")] += 6.0 / 3 * jnp.einsum(letters[kind], a, b)
    merged, adapted_outputs = run(unflatten_dict(expected)), run(params, lora)
    for reference, vectors, untrained in zip(merged, adapted_outputs, run(parameters()), strict=True):
        np.testing.assert_allclose(vectors, reference, atol=2e-6)
        assert np.abs(vectors - untrained).max() > 1e-2


def test_merged_parameters_give_the_same_outputs_without_adapters():
    lora = LoRAConfig(3, 6.0, 0.0, ALL)
    params = trained(parameters(ALL))
    merged = merge(params, lora.scale)
    assert jax.tree.structure(merged) == jax.tree.structure(parameters())
    for vectors, reference in zip(run(merged), run(params, lora), strict=True):
        np.testing.assert_allclose(vectors, reference, atol=2e-6)
    merged_untrained = merge(parameters(ALL), lora.scale)
    jax.tree.map(np.testing.assert_array_equal, merged_untrained, parameters())


@pytest.mark.parametrize(
    ("targets", "count", "words"), [("^text/.*mlp", 2, ["text", "mlp"]), ("image/projection$", 1, ["image/projection"])]
)
def test_only_linear_maps_whose_name_matches_targets_get_an_adapter(targets, count, words):
    names = adapted(parameters(targets))
    assert len(names) == count and all(word in name for name in names for word in words)


@pytest.mark.parametrize(
    ("targets", "words"), [("(", "not a regular expression"), ("quv", "the names of linear maps are image/projection")]
)
def test_the_error_for_invalid_targets_names_the_field(targets, words):
    with pytest.raises(UserError, match=f"config.lora.targets: .*{words}"):
        parameters(targets)


def test_dropout_needs_an_rng_is_determined_by_it_and_affects_only_adapters():
    lora = LoRAConfig(3, 6.0, 0.5, ALL)
    untrained, params = parameters(ALL), trained(parameters(ALL))
    key = jax.random.key(1)
    plain = run(params, lora)
    for dropped, full in zip(run(params, lora, rng=key), plain, strict=True):
        assert np.abs(dropped - full).max() > 1e-3
    for first, second in zip(run(params, lora, rng=key), run(params, lora, rng=key), strict=True):
        np.testing.assert_array_equal(first, second)
    for dropped, full in zip(run(untrained, lora, rng=key), run(parameters()), strict=True):
        np.testing.assert_allclose(dropped, full, atol=1e-6)
