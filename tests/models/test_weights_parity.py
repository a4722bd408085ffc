"""Towers and encoders with weights of transformers have the same outputs and training losses as in transformers."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from jaxclip.losses.contrastive import info_nce
from jaxclip.models.clip import CLIP
from jaxclip.models.lora import LoRAConfig
from jaxclip.models.weights import hugging_face, peft, table
from jaxclip.models.weights.encoders import load_bert, load_vit
from jaxclip.models.weights.positions import resize_grid

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLOSE = 1e-5
VOCABULARY, END = 300, 299
TEXT = {"vocab_size": VOCABULARY, "eos_token_id": END, "bos_token_id": 298, "pad_token_id": END}


def blocks(width, heads, layers=2, hidden=None, **more):
    size = {"hidden_size": width, "intermediate_size": hidden or 4 * width}
    return {**size, "num_hidden_layers": layers, "num_attention_heads": heads, **more}


def clip(vision, text, projection, **settings):
    config = transformers.CLIPConfig(
        vision_config={**vision, **settings}, text_config={**text, **TEXT, **settings}, projection_dim=projection
    )
    return transformers.CLIPModel(config)


CLIPS = {
    "vit_b_32": lambda: clip(blocks(768, 12, image_size=224, patch_size=32), blocks(512, 8), 512),
    "vit_b_16": lambda: clip(blocks(768, 12, image_size=224, patch_size=16), blocks(512, 8), 512),
    "vit_l_14": lambda: clip(blocks(1024, 16, image_size=224, patch_size=14), blocks(768, 12), 768),
    "gelu": lambda: clip(blocks(64, 2, image_size=64, patch_size=16), blocks(32, 2), 24, hidden_act="gelu"),
    "odd_sizes": lambda: clip(
        blocks(48, 3, hidden=100, image_size=48, patch_size=16, layer_norm_eps=1e-6), blocks(32, 4, hidden=70), 20
    ),
    "legacy_end": lambda: clip(blocks(32, 2, image_size=32, patch_size=16), blocks(32, 2), 16),
}


def siglip():
    config = transformers.SiglipConfig(
        vision_config=blocks(48, 3, hidden=100, image_size=64, patch_size=16),
        text_config={**blocks(48, 3, hidden=100), "vocab_size": VOCABULARY, "max_position_embeddings": 16},
    )
    return transformers.SiglipModel(config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns a function that saves a model of transformers with random weights and returns (folder, model)."""

    def write(make, change=lambda model: None):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim <= 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        change(model)
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        return folder, model

    return write


def towers(folder):
    """Returns a checkpoint, not loaded, and the graph and the parameters of its towers."""
    checkpoint = hugging_face.read(folder)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: CLIP(checkpoint.config, rngs=nnx.Rngs(0))))
    return checkpoint, graph, table.load(checkpoint.table, checkpoint.tensors, nnx.to_pure_dict(shapes))


def pictures(size, count=3):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def pixel_values(pixels, config):
    scaled = (pixels / 255.0 - np.asarray(config.mean)) / np.asarray(config.std)
    return torch.tensor(scaled.transpose(0, 3, 1, 2), dtype=torch.float32)


def captions(length, count=3):
    """Returns captions of `count` lengths, from empty to the whole context, padded with the end token."""
    random = np.random.default_rng(1)
    tokens = random.integers(1, 298, (count, length))
    lengths = np.linspace(0, length - 2, count).astype(int)
    tokens[:, 0] = 298
    tokens[np.arange(length) > lengths[:, None]] = END
    return tokens.astype(np.int32)


def assert_same(ours, expected):
    logits = ours.logit_scale * ours.image @ ours.text.T
    logits = logits if ours.logit_bias is None else logits + ours.logit_bias
    np.testing.assert_allclose(ours.image, expected.image_embeds.numpy(), atol=CLOSE, rtol=0)
    np.testing.assert_allclose(ours.text, expected.text_embeds.numpy(), atol=CLOSE, rtol=0)
    np.testing.assert_allclose(logits, expected.logits_per_image.numpy(), atol=CLOSE, rtol=0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.startswith("vit") else ()) for name in sorted(CLIPS)]
)
def test_clips_embeddings_and_logits_equal_those_of_transformers(checkpoint, name):
    def set_legacy_end(model):
        model.config.text_config.eos_token_id = model.text_model.eos_token_id = 2

    folder, model = checkpoint(CLIPS[name], set_legacy_end if name == "legacy_end" else lambda model: None)
    loaded, graph, params = towers(folder)
    config = loaded.config
    pixels, tokens = pictures(config.image.size), captions(config.text.context_length, 6)[-3:]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens).long(), pixel_values=pixel_values(pixels, config.image))
    assert_same(jax.jit(nnx.merge(graph, params))(pixels, tokens), expected)


def test_captions_of_every_length_have_the_embeddings_of_transformers(checkpoint):
    folder, model = checkpoint(CLIPS["gelu"])
    _, graph, params = towers(folder)
    tokens = captions(77, 77)
    with torch.no_grad():
        expected = model.get_text_features(input_ids=torch.tensor(tokens).long()).pooler_output
    vectors = jax.jit(nnx.merge(graph, params).encode_text)(tokens)
    np.testing.assert_allclose(vectors, torch.nn.functional.normalize(expected), atol=CLOSE)


def test_siglips_embeddings_and_logits_equal_those_of_transformers(checkpoint):
    folder, model = checkpoint(siglip)
    loaded, graph, params = towers(folder)
    config = loaded.config
    pixels, tokens = pictures(64), captions(16)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens).long(), pixel_values=pixel_values(pixels, config.image))
    assert_same(jax.jit(nnx.merge(graph, params))(pixels, tokens), expected)
    assert float(np.abs(params["logit_bias"])) > 0, "the bias must not be zero, or the test would not cover it"


def adapted(folder, targets):
    """Returns the configuration, the graph and the parameters of a checkpoint with random adapters."""
    loaded = hugging_face.read(folder)
    config = replace(loaded.config, lora=LoRAConfig(3, 6.0, 0.0, targets))
    graph, shapes = nnx.split(nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0))))
    shapes = flatten_dict(nnx.to_pure_dict(shapes))
    random = np.random.default_rng(0)
    adapters = {
        path: jnp.asarray(0.1 * random.normal(size=s.shape), s.dtype) for path, s in shapes.items() if "lora" in path
    }
    plain = unflatten_dict({path: s for path, s in shapes.items() if path not in adapters})
    params = flatten_dict(table.load(loaded.table, loaded.tensors, plain)) | adapters
    return config, graph, unflatten_dict(params)


@pytest.mark.parametrize("targets", ["blocks|/projection$", "text/.*qkv"])
def test_adapters_saved_for_peft_have_the_same_effect_in_peft(checkpoint, tmp_path, targets):
    library = pytest.importorskip("peft")
    folder, model = checkpoint(CLIPS["odd_sizes"])
    config, graph, params = adapted(folder, targets)
    tensors = peft.tensors(hugging_face.table(replace(config, lora=None)), params)
    save_file(tensors, tmp_path / peft.WEIGHTS, {"format": "pt"})
    settings = peft.settings(config.lora, str(folder), list(tensors))
    (tmp_path / peft.CONFIG).write_text(json.dumps(settings))
    loaded = library.PeftModel.from_pretrained(model, tmp_path)
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == len(settings["target_modules"])
    pixels, tokens = pictures(config.image.size), captions(config.text.context_length)
    with torch.no_grad():
        expected = loaded(input_ids=torch.tensor(tokens).long(), pixel_values=pixel_values(pixels, config.image))
    ours = jax.jit(nnx.merge(graph, params))(pixels, tokens)
    assert_same(ours, expected)
    _, plain_graph, plain = towers(folder)
    assert np.abs(ours.text - jax.jit(nnx.merge(plain_graph, plain))(pixels, tokens).text).max() > 0.01


def test_a_vits_class_token_equals_that_of_transformers(checkpoint):
    config = blocks(48, 3, image_size=64, patch_size=16)
    folder, model = checkpoint(lambda: transformers.ViTModel(transformers.ViTConfig(**config)))
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    vit, pixels = load_vit(folder), pictures(64)
    with torch.no_grad():
        expected = model(pixel_values(pixels, vit.config)).last_hidden_state
    np.testing.assert_allclose(vit(pixels), expected[:, 0], atol=CLOSE)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_berts_tokens_equal_those_of_transformers(checkpoint, prefix):
    settings = {**blocks(48, 3), "vocab_size": VOCABULARY, "max_position_embeddings": 32}

    def make():
        kind = transformers.BertForMaskedLM if prefix else transformers.BertModel
        return kind(transformers.BertConfig(**settings))

    folder, model = checkpoint(make)
    model = model.bert if prefix else model
    bert, tokens = load_bert(folder), captions(20, 5)
    inside = np.arange(20) < np.asarray([[20], [3], [11], [1], [19]])
    with torch.no_grad():
        expected = model(torch.tensor(tokens).long(), attention_mask=torch.tensor(inside).long()).last_hidden_state
    np.testing.assert_allclose(np.asarray(bert(tokens, inside))[inside], expected.numpy()[inside], atol=CLOSE)
    np.testing.assert_allclose(bert.features(tokens, inside), expected[:, 0], atol=CLOSE)


@pytest.mark.parametrize("make", [CLIPS["odd_sizes"], siglip], ids=["clip", "siglip"])
def test_a_checkpoint_is_written_as_it_was_read_bit_by_bit_and_transformers_loads_it(checkpoint, tmp_path, make):
    from safetensors.numpy import load_file, save_file

    folder, model = checkpoint(make)
    original, _, params = towers(folder)
    written = table.save(original.table, params)
    stored = load_file(folder / "model.safetensors")
    assert written.keys() == stored.keys()
    for name, value in stored.items():
        np.testing.assert_array_equal(written[name], value, strict=True)
    save_file(written, tmp_path / "model.safetensors", {"format": "pt"})
    config = original.config
    (tmp_path / "config.json").write_text(json.dumps(hugging_face.write_config(config)))
    assert hugging_face.read(tmp_path).config == config
    reloaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    pixels, tokens = pictures(config.image.size), captions(config.text.context_length)
    inputs = {"input_ids": torch.tensor(tokens).long(), "pixel_values": pixel_values(pixels, config.image)}
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(**inputs).logits_per_image, model(**inputs).logits_per_image)


@pytest.mark.parametrize("size", [96, 32])
def test_for_another_picture_size_positions_are_interpolated_as_in_transformers(checkpoint, size):
    folder, model = checkpoint(CLIPS["gelu"])
    loaded = hugging_face.read(folder)
    config = replace(loaded.config, image=replace(loaded.config.image, size=size))
    graph, shapes = nnx.split(nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0))))
    params = table.load(loaded.table, loaded.tensors, nnx.to_pure_dict(shapes))
    pixels = pictures(size)
    with torch.no_grad():
        expected = model.get_image_features(pixel_values(pixels, config.image), interpolate_pos_encoding=True)
    image = jax.jit(nnx.merge(graph, params).encode_image)(pixels)
    np.testing.assert_allclose(image, torch.nn.functional.normalize(expected.pooler_output), atol=CLOSE)


@pytest.mark.parametrize("after", [3, 7, 16, 24])
def test_positions_are_interpolated_as_in_torch(after):
    positions = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    grid = torch.tensor(positions[1:].reshape(1, 7, 7, 5)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    resized = resize_grid(positions, (after * after + 1, 5), class_token=True)
    np.testing.assert_array_equal(resized[0], positions[0])
    np.testing.assert_allclose(resized[1:].reshape(after, after, 5), expected[0].permute(1, 2, 0), atol=1e-5)


@pytest.mark.slow
def test_ten_steps_of_adamw_have_the_losses_of_torch(checkpoint):
    folder, model = checkpoint(CLIPS["odd_sizes"])
    loaded, graph, params = towers(folder)
    config = loaded.config
    rate, decay, size, length = 1e-3, 0.1, config.image.size, config.text.context_length
    random = np.random.default_rng(3)
    batches = [
        (random.integers(0, 256, (8, size, size, 3), dtype=np.uint8), random.permutation(captions(length, 8)))
        for _ in range(10)
    ]
    adam = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay)
    expected = []
    for pixels, tokens in batches:
        out = model(
            input_ids=torch.tensor(tokens).long(),
            pixel_values=pixel_values(pixels, config.image),
            return_loss=True,
        )
        adam.zero_grad()
        out.loss.backward()
        adam.step()
        expected.append(out.loss.item())
    ours = optax.adamw(rate, 0.9, 0.98, 1e-6, weight_decay=decay)

    @jax.jit
    def step(params, state, pixels, tokens):
        def loss(params):
            return info_nce(*nnx.merge(graph, params)(pixels, tokens)[:3])[0]

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = ours.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    losses, state = [], ours.init(params)
    for pixels, tokens in batches:
        params, state, value = step(params, state, jnp.asarray(pixels), jnp.asarray(tokens))
        losses.append(float(value))
    np.testing.assert_allclose(losses, expected, atol=1e-4)
    assert np.ptp(expected) > 0.1, "the losses must change, or equal losses would prove nothing"
