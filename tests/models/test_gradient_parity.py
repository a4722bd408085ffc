"""The gradients of every parameter of CLIP and SigLIP on padded captions equal those of transformers in PyTorch."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxclip.losses.contrastive import info_nce
from jaxclip.losses.sigmoid import sigmoid
from jaxclip.models.clip import CLIP
from jaxclip.models.weights import hugging_face, table

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLOSE = 1e-5
VOCABULARY, START, END, LENGTH, PAIRS = 300, 298, 299, 16, 8
VISION = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 3}
PICTURES = {"image_size": 48, "patch_size": 16}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "bos_token_id": START, "eos_token_id": END}


def clip(padding):
    text = {**VISION, "hidden_size": 36, **TEXT, "pad_token_id": padding}
    return transformers.CLIPModel(
        transformers.CLIPConfig(vision_config={**VISION, **PICTURES}, text_config=text, projection_dim=20)
    )


def siglip(padding):
    text = {**VISION, **TEXT, "pad_token_id": padding}
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config={**VISION, **PICTURES}, text_config=text))


def captions(padding):
    """Returns captions of different lengths, the last as long as the context: start, words, end, `padding`."""
    random = np.random.default_rng(1)
    tokens = random.integers(1, 20, (PAIRS, LENGTH))  # few words, so that captions share them
    lengths = np.linspace(1, LENGTH - 1, PAIRS).astype(int)
    tokens[:, 0] = START
    tokens[np.arange(LENGTH) > lengths[:, None]] = padding
    tokens[np.arange(PAIRS), lengths] = END
    return tokens.astype(np.int32)


@pytest.mark.parametrize("padding", [END, 0])
@pytest.mark.parametrize("make", [clip, siglip])
def test_gradients_of_every_parameter_equal_those_of_transformers(tmp_path, make, padding):
    torch.manual_seed(0)
    model = make(padding).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are not to be zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = hugging_face.read(tmp_path)
    image, tokens = loaded.config.image, captions(padding)
    pixels = np.random.default_rng(0).integers(0, 256, (PAIRS, 48, 48, 3), dtype=np.uint8)
    scaled = (pixels / 255.0 - np.asarray(image.mean)) / np.asarray(image.std)
    expected = model(
        input_ids=torch.tensor(tokens).long(),
        pixel_values=torch.tensor(scaled.transpose(0, 3, 1, 2), dtype=torch.float32),
        return_loss=True,
    ).loss
    expected.backward()

    graph, shapes = nnx.split(nnx.eval_shape(lambda: CLIP(loaded.config, rngs=nnx.Rngs(0))))
    params = table.load(loaded.table, loaded.tensors, nnx.to_pure_dict(shapes))

    def loss(params):
        embeddings = nnx.merge(graph, params)(pixels, tokens)
        return info_nce(*embeddings[:3])[0] if make is clip else sigmoid(*embeddings)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected.item(), rtol=CLOSE)
    ours = table.save(loaded.table, gradients)
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    differences = {
        # The bias of keys has no gradient, only rounding: it counts as part of our bias of queries, keys and values.
        f"{row.ours} {layer}": max(np.abs(ours[name] - theirs[name]).max() for name in row.names(layer))
        / max(np.abs(theirs[name]).max() for name in row.names(layer))
        for row in loaded.table
        for layer in range(2 if row.stacked else 1)
    }
    assert max(differences.values()) <= CLOSE, {name: value for name, value in differences.items() if value > CLOSE}
