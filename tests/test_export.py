"""Exported towers compute the same embeddings in transformers, and in JAX where only JAX and NumPy are installed."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxclip import config

CONFIG = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.batch_size, config.steps = 16, 2
    config.data = ConfigDict(
        {"drawn_products": 150, "image_size": 64, "context_length": 12, "vocab_size": 300}
        | {"test": 0.2, "resize": "crop"}
    )
    config.model = ConfigDict({"preset": "vit_b_32"})
    return config
"""
WITHOUT_JAXCLIP = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jaxclip", "flax", "optax", "transformers", "safetensors", "tensorflow", "orbax"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Absent())
folder, inputs, out = sys.argv[1:]
sys.path.insert(0, folder)
import numpy as np
import load_towers

towers, inputs = load_towers.load(folder), np.load(inputs)
embeddings = {"image": towers.image(inputs["pixels"]), "text": towers.text(inputs["tokens"]),
              "one": towers.image(inputs["pixels"][:1])}
np.savez(out, **embeddings, scale=towers.logit_scale, bias=towers.logit_bias)
"""


def encode(workdir, pixels, tokens):
    """Returns what the towers of a workdir's newest checkpoint compute for pixels and tokens."""
    import jax
    from flax import nnx

    from jaxclip.towers.checkpoints import Checkpoints
    from jaxclip.towers.towers import load_towers

    towers = load_towers(config.load_config(workdir), workdir)
    checkpoints = Checkpoints(workdir, read_only=True)
    with jax.set_mesh(towers.mesh):
        params = checkpoints.restore_params(towers.shapes, checkpoints.steps()[-1])
    return nnx.merge(towers.graph, params)(pixels, tokens)


def make_inputs(workdir):
    """Returns random pixels and three tokenized captions in the shapes that a workdir's towers accept."""
    from jaxclip.pipeline import text

    preprocess = json.loads((workdir / "preprocess.json").read_text())
    size, length = preprocess["image_size"], preprocess["context_length"]
    pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    tokens = text.encode(text.load_tokenizer(workdir / "tokenizer"), ["a red shirt", "", "blue " * 50], length)
    return pixels, tokens


def test_towers_without_a_transformers_model_are_refused_in_its_layout_and_exported_for_jax_alone(
    run, trained, tmp_path
):
    refused = run("export", f"--workdir={trained}", f"--output={tmp_path / 'refused'}")
    assert refused.returncode == 2, refused.stderr
    assert "error: neither CLIPModel nor SiglipModel supports a convolutional stem" in refused.stderr
    assert not (tmp_path / "refused").exists()

    out, (pixels, tokens) = tmp_path / "out", make_inputs(trained)
    done = run("export", f"--workdir={trained}", f"--output={out}", "--layouts=stablehlo")
    assert done.returncode == 0 and "checkpoint of step 12" in done.stdout, done.stderr
    np.savez(tmp_path / "inputs.npz", pixels=pixels, tokens=tokens)
    command = [sys.executable, "-c", WITHOUT_JAXCLIP, out, tmp_path / "inputs.npz", tmp_path / "embeddings.npz"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = "trained_groups.npy"  # evaluations of the export leave out the products that the run was trained on
    assert (out / name).read_bytes() == (trained / name).read_bytes()
    actual, expected = np.load(tmp_path / "embeddings.npz"), encode(trained, pixels, tokens)
    np.testing.assert_allclose(actual["image"], expected.image, atol=1e-5)
    np.testing.assert_allclose(actual["text"], expected.text, atol=1e-5)
    np.testing.assert_allclose(actual["one"], actual["image"][:1], atol=1e-5)
    np.testing.assert_allclose(actual["scale"], expected.logit_scale, rtol=1e-5)
    assert actual["bias"] == 0


@pytest.mark.slow
def test_transformers_loads_an_export_with_its_processor_and_computes_the_same_embeddings(run, tmp_path):
    torch = pytest.importorskip("torch")
    from PIL import Image
    from transformers import AutoProcessor, CLIPModel

    (tmp_path / "small.py").write_text(CONFIG)
    workdir, out = tmp_path / "workdir", tmp_path / "out"
    done = run("train", f"--config={tmp_path / 'small.py'}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    done = run("export", f"--workdir={workdir}", f"--output={out}", "--layouts=transformers")
    assert done.returncode == 0, done.stderr
    pixels, tokens = make_inputs(workdir)
    processor, model = AutoProcessor.from_pretrained(out), CLIPModel.from_pretrained(out).eval()
    captions = ["A Red SHIRT", "", "blue " * 50]  # the run lowercased its captions, and so does the export's tokenizer
    inputs = processor(
        text=captions,
        images=[Image.fromarray(picture) for picture in pixels],
        return_tensors="pt",
        padding="max_length",
        truncation=True,
    )
    np.testing.assert_array_equal(inputs["input_ids"], tokens)
    with torch.no_grad():
        theirs = model(**inputs)
    ours = encode(workdir, pixels, tokens)
    np.testing.assert_allclose(theirs.image_embeds.numpy(), ours.image, atol=1e-5)
    np.testing.assert_allclose(theirs.text_embeds.numpy(), ours.text, atol=1e-5)


def test_an_unknown_layout_or_none_is_refused(run, trained, tmp_path):
    known = "give one or more of transformers, open_clip, stablehlo"
    for layouts, problem in (("transformers,onnx", f": 'onnx' is not a layout; {known}"), ("", f" is empty: {known}")):
        done = run("export", f"--workdir={trained}", f"--output={tmp_path / 'out'}", f"--layouts={layouts}")
        assert done.returncode == 2 and f"error: --layouts{problem}" in done.stderr
