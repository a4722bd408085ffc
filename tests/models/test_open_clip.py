"""Checkpoints of open_clip have the same outputs here and there, and open_clip loads the checkpoints written here."""

import json
import logging
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxclip.models.clip import CLIP
from jaxclip.models.weights import open_clip, table

torch = pytest.importorskip("torch")
try:
    import open_clip as oracle
except (ImportError, RuntimeError) as missing:  # RuntimeError: a torchvision of another build than torch
    pytest.skip(f"open_clip cannot be imported: {missing}", allow_module_level=True)

CLOSE = 1e-5
TEXT = {"vocab_size": 300, "context_length": 16, "width": 64, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 2}
CLIP_MODEL = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
SIGLIP_TEXT = {
    "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}  # fmt: skip


def siglip(name, size, **text):
    """Returns the configuration of a SigLIP with one of timm's image towers and a small text tower."""
    vision = {"image_size": size, "timm_model_name": name, "timm_model_pretrained": False}
    vision |= {"timm_pool": "map", "timm_proj": "none"}
    model = {"embed_dim": 768, "init_logit_bias": -10.0, "custom_text": True}
    return model | {"vision_cfg": vision, "text_cfg": {**TEXT, **text}}


MODELS = {
    "gelu": CLIP_MODEL,
    "quick_gelu": {**CLIP_MODEL, "quick_gelu": True},
    "own_text_tower": {**CLIP_MODEL, "custom_text": True},
    "other_end": {**CLIP_MODEL, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 7}},
    "bias": {**CLIP_MODEL, "init_logit_bias": -5.0},
    "siglip2": siglip("vit_base_patch32_siglip_256", 256, **SIGLIP_TEXT),
    "marqo": siglip("vit_base_patch16_siglip_224", 224, **{**SIGLIP_TEXT, "act_kwargs": None}),
}
SLOW = ("siglip2", "marqo")


def build(model):
    """Returns open_clip's randomly initialised model of a configuration."""
    torch.manual_seed(0)
    kind = oracle.model.CustomTextCLIP if model.get("custom_text") else oracle.model.CLIP
    built = kind(**{name: value for name, value in model.items() if name != "custom_text"}).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def write(folder, model, tensors):
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / open_clip.CONFIG).write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    save_file(tensors, folder / open_clip.WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MODELS])
def test_a_checkpoint_has_the_outputs_of_open_clip_and_open_clip_loads_what_is_written(tmp_path, name):
    logging.getLogger().setLevel(logging.ERROR)
    model = build(MODELS[name])
    stored = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    write(tmp_path, MODELS[name], stored)
    checkpoint = open_clip.read(tmp_path)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: CLIP(checkpoint.config, rngs=nnx.Rngs(0))))
    params = table.load(checkpoint.table, checkpoint.tensors, nnx.to_pure_dict(shapes))

    random = np.random.default_rng(0)
    size, end = checkpoint.config.image.size, checkpoint.config.text.end_token
    pixels = random.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    tokens = random.integers(8, 290, (2, 16)).astype(np.int32)
    tokens[0, 9:] = tokens[1, 15:] = end
    image_config = checkpoint.config.image
    scaled = (pixels / 255.0 - np.asarray(image_config.mean)) / np.asarray(image_config.std)
    with torch.no_grad():
        inputs = torch.tensor(scaled.transpose(0, 3, 1, 2)).float(), torch.tensor(tokens).long()
        image, text, scale, *bias = model(*inputs)
    ours = jax.jit(nnx.merge(graph, params))(pixels, tokens)
    np.testing.assert_allclose(ours.image, image.numpy(), atol=CLOSE)
    np.testing.assert_allclose(ours.text, text.numpy(), atol=CLOSE)
    np.testing.assert_allclose(ours.logit_scale, scale.numpy(), rtol=1e-6)
    assert (ours.logit_bias is None) == (not bias) and (not bias or float(ours.logit_bias) == float(bias[0]))

    out = tmp_path / "out"
    out.mkdir()
    settings = open_clip.write_config(checkpoint.config)
    del settings["text_cfg"]["hf_tokenizer_name"]
    nested = not image_config.projection
    written = table.save(open_clip.table(checkpoint.config, nested=nested), params)
    for key, value in written.items():
        np.testing.assert_array_equal(value, stored[key if key in stored else f"text.{key}"], strict=True)
    write(out, settings, written)
    reloaded = oracle.create_model(f"local-dir:{out}").eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(reloaded(*inputs), model(*inputs), strict=True))
    assert replace(open_clip.read(out).config, logit_bias=checkpoint.config.logit_bias) == checkpoint.config
    assert load_file(out / open_clip.WEIGHTS).keys() == written.keys()


@pytest.mark.parametrize(
    ("size", "patch", "image_size"),
    [(*key, image_size) for key, image_sizes in open_clip.TIMM_IMAGE_SIZES.items() for image_size in image_sizes],
)
def test_the_table_of_siglips_image_towers_agrees_with_timm(tmp_path, size, patch, image_size):
    name = f"vit_{size}_patch{patch}_siglip_{image_size}"
    with torch.device("meta"):
        theirs = pytest.importorskip("timm").create_model(name)
    (block, *_), model = theirs.blocks, siglip(name, image_size, **SIGLIP_TEXT)
    (tmp_path / open_clip.CONFIG).write_text(json.dumps({"model_cfg": model}))
    save_file({"logit_scale": np.zeros((), np.float32)}, tmp_path / open_clip.WEIGHTS)
    ours = open_clip.read(tmp_path).config.image
    blocks = ours.transformer
    assert (blocks.layers, blocks.width, blocks.heads) == (len(theirs.blocks), theirs.embed_dim, block.attn.num_heads)
    assert round(blocks.width * blocks.mlp_ratio) == block.mlp.fc1.out_features
    assert blocks.epsilon == block.norm1.eps and (ours.size, ours.patch) == (image_size, patch)
    tanh = getattr(block.mlp.act, "approximate", "none") == "tanh" or "Tanh" in type(block.mlp.act).__name__
    assert (blocks.activation == "gelu_tanh") == tanh
