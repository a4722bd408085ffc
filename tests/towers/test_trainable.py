"""Trained parameters are selected by name and layer; frozen ones get no gradient and stay unchanged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxclip.config.schema import Optimizer
from jaxclip.models.presets import Preset, clip_config, with_execution
from jaxclip.runtime.mesh import make_mesh
from jaxclip.towers.params import make_model
from jaxclip.towers.sharding import names
from jaxclip.towers.trainable import make_trainable
from jaxclip.training.optimizer import make_optimizer
from jaxclip.training.state import abstract_state, initial_state
from jaxclip.training.step import make_loss, make_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
LAYERS, BATCH, CONTEXT, END, EMA = 3, 8, 6, 63, 0.15
UPPER = (("blocks/[12]/", 1.0), ("^[a-z]+/(last_norm|projection)", 1.0), ("", 0.0))


def towers(execution="unroll"):
    config = with_execution(
        clip_config(
            Preset(16, (32, LAYERS, 2), (32, LAYERS, 2), 32),
            image_size=32,
            vocab_size=64,
            context_length=CONTEXT,
            end_token=END,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
        ),
        execution=execution,
    )
    return config, *make_model(config)


def by_name(tree):
    return dict(zip(jax.tree.leaves(names(tree)), map(np.asarray, jax.tree.leaves(tree)), strict=True))


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, END, (BATCH, CONTEXT), dtype=np.int32)
    tokens[:, -1] = END
    pictures = rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
    return {"image": pictures, "text": tokens, "group": np.arange(BATCH, dtype=np.int32)}


@functools.cache
def train(rates, execution="unroll", *, layer_decay=1.0):
    """Returns the initial state and the states after each of three steps, and the FLOPs of a step."""
    config, graph, shapes = towers(execution)
    trainable = make_trainable(shapes, rates, layer_decay=layer_decay)
    schedule = optax.constant_schedule(1e-2)
    adam = Optimizer(name="adamw", weight_decay=0.1, beta1=0.9, beta2=0.98, epsilon=1e-2, clip_norm=0.0)
    optimizer = make_optimizer(adam, schedule, shapes, trainable)
    abstract = abstract_state(shapes, optimizer, make_mesh(1, 1, 1, jax.devices()[:1]), trainable, ema=True)
    states = [initial_state(config, optimizer, abstract, trainable, seed=0)]
    loss = make_loss(graph, mask_groups=True, learned_temperature=True)
    step = make_step(loss, optimizer, schedule, trainable, seed=0, ema=EMA)
    compiled = jax.jit(step).lower(states[0], batch()).compile()
    for _ in range(3):
        states.append(compiled(states[-1], batch())[0])
    return states, compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("execution", ["unroll", "scan"])
def test_frozen_layers_stay_bit_identical_and_the_others_move_as_if_all_were_trained(execution):
    before, after = (by_name(state.params) for state in train(UPPER, execution)[0][:2])
    whole = by_name(train((), execution)[0][1].params)
    for name, leaf in after.items():
        if "/blocks/" in name:
            np.testing.assert_array_equal(leaf[:1], before[name][:1], err_msg=name)
            np.testing.assert_allclose(leaf[1:], whole[name][1:], atol=1e-5, err_msg=name)
            assert not np.array_equal(leaf[1:], before[name][1:])
        elif name.split("/")[1:2] in (["last_norm"], ["projection"]):
            np.testing.assert_allclose(leaf, whole[name], atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(leaf, before[name], err_msg=name)


def test_frozen_parameters_have_no_optimizer_state():
    moments = by_name(train(UPPER)[0][-1].optimizer)
    assert sum("/blocks/" in name for name in moments) == 2 * 2 * 12
    assert all(len(moment) == 2 for name, moment in moments.items() if "/blocks/" in name)
    assert not [name for name in moments if "stem" in name or "positions" in name or "logit_scale" in name]


def test_layers_that_are_not_neighbours_can_be_trained():
    before, *_, after = (by_name(state.params) for state in train((("blocks/[02]/mlp", 1.0), ("", 0.0)))[0])
    for name, leaf in after.items():
        layers = [
            not np.array_equal(*pair) for pair in zip(np.atleast_1d(leaf), np.atleast_1d(before[name]), strict=True)
        ]
        assert layers == [True, False, True] if "/blocks/mlp_" in name else not any(layers), name


@pytest.mark.parametrize(
    ("rates", "execution", "share"),
    [
        ((("^image/", 0.0),), "unroll", 0.8),
        (UPPER, "unroll", 0.8),
        # XLA counts the body of a scan once: 1 product per kernel for the frozen layers and 3 for the trained ones,
        # against 3 where all layers are trained.
        (UPPER, "scan", 1.2),
    ],
)
def test_no_gradient_is_computed_for_frozen_parameters(rates, execution, share):
    """The forward pass takes one matrix product per kernel, the backward pass two more."""
    assert train(rates, execution)[1] < share * train((), execution)[1]


def test_rates_match_names_of_stacks_and_of_layers_and_the_first_match_applies():
    _, _, shapes = towers()
    trainable = make_trainable(shapes, (("^image/.*blocks/2/", 0.5), ("^text/transformer/blocks/mlp_in", 0.25)))
    image, text = (trainable.factors[f"{t}/transformer/blocks/mlp_in/kernel"] for t in ("image", "text"))
    assert list(image) == [1.0, 1.0, 0.5] and text == 0.25


def test_layer_decay_depends_on_the_number_of_layers_above_in_each_tower():
    _, _, shapes = towers()
    factors = make_trainable(shapes, (("^text", 0.0),), layer_decay=0.5).factors
    np.testing.assert_allclose(factors["image/transformer/blocks/mlp_in/kernel"], [0.5**3, 0.5**2, 0.5])
    for below in ("stem/projection/kernel", "class_token", "positions", "first_norm/scale"):
        assert factors[f"image/{below}"] == 0.5**4
    assert factors["image/projection/kernel"] == factors["image/last_norm/scale"] == factors["logit_scale"] == 1.0
    assert factors["text/token_embedding/embedding"] == 0.0


def test_layer_decay_is_the_same_for_layers_that_are_not_stacked():
    stacked = {"image": {"transformer": {"blocks": {"kernel": jnp.zeros((3, 2))}}, "positions": jnp.zeros(2)}}
    layers = {str(layer): {"kernel": jnp.zeros(2)} for layer in range(3)}
    separate = {"image": {"transformer": {"blocks": layers}, "positions": jnp.zeros(2)}}
    stacked_factors = make_trainable(stacked, (), layer_decay=0.8).factors
    separate_factors = make_trainable(separate, (), layer_decay=0.8).factors
    assert [separate_factors[f"image/transformer/blocks/{layer}/kernel"] for layer in range(3)] == list(
        stacked_factors["image/transformer/blocks/kernel"]
    )
    assert separate_factors["image/positions"] == stacked_factors["image/positions"] == pytest.approx(0.8**4)


def test_the_update_of_each_layer_is_scaled_by_its_decay():
    (before, plain, *_), _ = train(())
    (_, decayed, *_), _ = train((), layer_decay=0.5)
    before, plain, decayed = (by_name(state.params) for state in (before, plain, decayed))
    name = "text/transformer/blocks/attention/qkv/kernel"
    for layer in range(LAYERS):
        whole, part = plain[name][layer] - before[name][layer], decayed[name][layer] - before[name][layer]
        np.testing.assert_allclose(part, whole * 0.5 ** (LAYERS - layer), atol=3e-7)


@pytest.mark.parametrize("rates", [(), UPPER], ids=["all", "upper two layers"])
def test_the_moving_average_is_over_the_parameters_of_all_steps(rates):
    first, *states = train(rates)[0]
    average = {name: leaf.astype(np.float64) for name, leaf in by_name(first.params).items()}
    for state, decay in zip(states, [1 / 10, EMA, EMA], strict=True):
        average = {name: decay * average[name] + (1 - decay) * leaf for name, leaf in by_name(state.params).items()}
    ema = by_name(states[-1].ema)
    assert ("image/positions" in ema) == (rates == ())
    for name, leaf in ema.items():
        np.testing.assert_allclose(leaf, average[name], atol=1e-5, err_msg=name)
        if rates and "/blocks/" in name:
            np.testing.assert_array_equal(leaf[:1], by_name(first.params)[name][:1], err_msg=name)
