"""The presets have exactly the sizes of the models after which they are named."""

import math

import jax
import pytest
from flax import nnx

from jaxclip.models.clip import CLIP
from jaxclip.models.presets import PRESETS, clip_config, with_execution

OPENAI = {"vit_b_32": 151_277_313, "vit_b_16": 149_620_737, "vit_l_14": 427_616_513}


def config_of(preset, image_size=224, vocab_size=49_408, context_length=77, **execution):
    return with_execution(
        clip_config(
            PRESETS[preset],
            image_size=image_size,
            vocab_size=vocab_size,
            context_length=context_length,
            end_token=vocab_size - 1,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ),
        **execution,
    )


def count_parameters(config):
    shapes = nnx.eval_shape(lambda: nnx.state(CLIP(config, rngs=nnx.Rngs(0)), nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("preset", sorted(OPENAI))
def test_a_published_preset_has_as_many_parameters_as_openais_model(preset):
    assert count_parameters(config_of(preset)) == OPENAI[preset]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_both_towers_of_every_preset_return_embeddings_of_one_size(preset):
    config = config_of(preset, image_size=4 * PRESETS[preset].patch, vocab_size=512, context_length=8)

    def encode(pixels, tokens):
        return CLIP(config, rngs=nnx.Rngs(0))(pixels, tokens)

    size = config.image.size
    embeddings = jax.eval_shape(
        encode, jax.ShapeDtypeStruct((2, size, size, 3), "uint8"), jax.ShapeDtypeStruct((2, 8), "int32")
    )
    assert embeddings.image.shape == embeddings.text.shape == (2, PRESETS[preset].embedding)
    assert embeddings.logit_scale.shape == ()


def test_execution_dtype_and_regularisation_do_not_change_the_number_of_parameters():
    plain = count_parameters(config_of("tiny", 64, 512, 8))
    for execution in ({"execution": "scan"}, {"remat": "full"}, {"dtype": "bfloat16"}, {"dropout": 0.1}):
        assert count_parameters(config_of("tiny", 64, 512, 8, **execution)) == plain
    assert count_parameters(config_of("tiny", 64, 512, 8, patch_dropout=0.5, stochastic_depth=0.5)) == plain
