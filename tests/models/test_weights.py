"""Checkpoints of other libraries are read unchanged onto any mesh, or refused in one sentence; nothing is unpickled."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxclip.errors import UserError
from jaxclip.models.clip import CLIP, CLIPConfig, ImageConfig, TextConfig
from jaxclip.models.transformer import TransformerConfig
from jaxclip.models.weights import hugging_face, open_clip, table
from jaxclip.models.weights.tensors import open_tensors
from jaxclip.runtime import mesh as meshes
from jaxclip.towers import sharding

BLOCKS = TransformerConfig(width=32, layers=2, heads=2, mlp_ratio=3.0)
CLIP_TOWERS = CLIPConfig(ImageConfig(32, 8, BLOCKS), TextConfig(64, 12, 63, BLOCKS), 24)
SIGLIP_TOWERS = CLIPConfig(
    ImageConfig(32, 8, BLOCKS, pooling="map", stem_bias=True, first_norm=False, projection=False),
    TextConfig(64, 12, 63, BLOCKS, pooling="last", projection_bias=True),
    32,
    logit_bias=0.0,
)
LAST = "text_model.final_layer_norm.bias"


def shapes_of(config):
    return nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(CLIP(config, rngs=nnx.Rngs(0)))))


def random_params(config):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes_of(config))


def write(folder, config=CLIP_TOWERS, change=lambda tensors: tensors, layout=hugging_face):
    """Writes a checkpoint of random weights and returns them."""
    params = random_params(config)
    settings = layout.write_config(config)
    if layout is open_clip:
        settings, rows = {"model_cfg": settings}, open_clip.table(config, nested=False)
    else:
        rows = hugging_face.table(config)
    (folder / layout.CONFIG).write_text(json.dumps(settings))
    save_file(change(table.save(rows, params)), folder / layout.WEIGHTS, {"format": "pt"})
    return params


def load(folder, config=None, layout=hugging_face):
    checkpoint = layout.read(folder)
    return table.load(checkpoint.table, checkpoint.tensors, shapes_of(config or checkpoint.config))


def assert_equal(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), actual, expected)


@pytest.mark.parametrize("layout", [hugging_face, open_clip], ids=["transformers", "open_clip"])
@pytest.mark.parametrize("config", [CLIP_TOWERS, SIGLIP_TOWERS], ids=["clip", "siglip"])
def test_a_written_checkpoint_is_read_back_bit_by_bit(tmp_path, config, layout):
    if layout is open_clip and config is SIGLIP_TOWERS:
        pytest.skip("timm has no image tower this small; see test_open_clip.py")
    params = write(tmp_path, config, layout=layout)
    assert layout.read(tmp_path).config == config
    assert_equal(load(tmp_path, layout=layout), params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_of_any_precision_are_loaded_as_float32(tmp_path, dtype):
    params = write(tmp_path, change=lambda tensors: {name: value.astype(dtype) for name, value in tensors.items()})
    loaded = load(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}
    assert_equal(loaded, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), params))


def test_a_checkpoint_in_several_files_is_read_through_its_index(tmp_path):
    params = write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert_equal(load(tmp_path), params)
    index.write_text(json.dumps({"weight_map": {**files, names[0]: files[names[1]]}}))
    with pytest.raises(UserError, match=f"disagrees with the files that it lists, for example about {names[0]}"):
        load(tmp_path)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_weights_are_loaded_directly_into_their_shardings_on_any_mesh(tmp_path, sizes):
    blocks = replace(BLOCKS, width=64, heads=8)
    config = CLIPConfig(ImageConfig(32, 8, blocks), TextConfig(128, 12, 127, blocks), 24)
    params = write(tmp_path, config)
    shapes = shapes_of(config)
    shardings = sharding.shardings(shapes, meshes.make_mesh(*sizes))
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    checkpoint = hugging_face.read(tmp_path)
    loaded = table.load(checkpoint.table, checkpoint.tensors, abstract)
    assert_equal(loaded, params)
    jax.tree.map(lambda leaf, sharding: pytest.fail() if leaf.sharding != sharding else None, loaded, shardings)
    kernel = loaded["image"]["transformer"]["blocks"]["mlp_in"]["kernel"]
    assert not kernel.sharding.is_fully_replicated, "this mesh splits no parameter, so the test would prove nothing"


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (without(LAST), rf"\(missing: {LAST}\)"),
        (lambda tensors: {**tensors, "adapter.weight": np.zeros(3, np.float32)}, r"\(unknown: adapter.weight\)"),
        (
            lambda tensors: {**tensors, LAST: np.zeros(7, np.float32)},
            rf"\(wrong shape: {LAST} is \(7,\), not \(32,\)\)",
        ),
        (lambda tensors: {**without(LAST)(tensors), "a": np.zeros(1, np.float32)}, rf"\(missing: {LAST}; unknown: a\)"),
        (lambda tensors: {**tensors, LAST: np.zeros(32, np.int64)}, f"{LAST} has dtype I64, not one of F64, F32"),
    ],
    ids=["missing", "extra", "misshaped", "renamed", "integers"],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, message):
    write(tmp_path, change=change)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_constants_that_old_releases_stored_are_ignored(tmp_path):
    ids = {"text_model.embeddings.position_ids": np.arange(12)[None]}
    params = write(tmp_path, change=lambda tensors: {**tensors, **ids})
    assert_equal(load(tmp_path), params)


class Bomb:
    """An object whose unpickling ends the tests."""

    def __reduce__(self):
        return (pytest.exit, ("a pickle was loaded",))


def write_zipped_pickle(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))


def header(text, length=None):
    data = text.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def entry(begin, end, dtype="F32", shape=(2,)):
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}})


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "a zipped pickle": write_zipped_pickle,
    "a header longer than the file": lambda path: path.write_bytes(header("{}", 1 << 40)),
    "a header that is not JSON": lambda path: path.write_bytes(header("{not json}")),
    "a tensor beyond the end": lambda path: path.write_bytes(header(entry(0, 8)) + bytes(4)),
    "a hole": lambda path: path.write_bytes(header(entry(4, 12)) + bytes(12)),
    "a size that does not match the shape": lambda path: path.write_bytes(header(entry(0, 8, shape=(3,))) + bytes(8)),
    "an unknown type": lambda path: path.write_bytes(header(entry(0, 8, dtype="X9")) + bytes(8)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "truncated in the header": lambda path: path.write_bytes(path.read_bytes()[:50]),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_is_not_a_complete_safetensors_file_is_refused_in_one_sentence(tmp_path, damage):
    write(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(UserError) as raised:
        load(tmp_path)
    message = str(raised.value)
    assert "model.safetensors" in message and "\n" not in message
    is_pickle = damage in (write_zipped_pickle, BROKEN["a pickle"])
    assert ("never unpickled" if is_pickle else "not a safetensors file") in message


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "model.bin", "..\\m.safetensors"],
)
def test_an_index_that_names_a_file_outside_the_folder_is_refused(tmp_path, file):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {LAST: file}}))
    with pytest.raises(UserError, match=r"only safetensors files of the same folder are read"):
        load(folder)


def test_a_folder_with_only_pickles_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, which would have to be unpickled"):
        load(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ("", "is not valid JSON"),
        ("[]", "contains a value of type list, but must contain a JSON object"),
        ('{"model_type": "llama"}', "model_type is 'llama'; only clip and siglip can be loaded"),
        ('{"model_type": "clip", "vision_config": {"hidden_act": "swish"}}', "hidden_act = 'swish' is not one of"),
        ('{"model_type": "clip", "vision_config": {"num_attention_heads": 5}}', "is not a multiple of the number"),
        ('{"model_type": "clip", "vision_config": 3}', "does not describe a clip model"),
    ],
)
def test_an_invalid_configuration_is_refused_in_one_sentence(tmp_path, settings, message):
    write(tmp_path)
    (tmp_path / "config.json").write_text(settings)
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "section, change, message",
    [
        ("vision_cfg", {"attentional_pool": True}, "vision_cfg.attentional_pool = True is not supported"),
        ("vision_cfg", {"timm_model_name": "resnet50"}, "resnet50 is not supported; of timm's image towers"),
        ("text_cfg", {"hf_model_name": "roberta"}, "text_cfg.hf_model_name = 'roberta' is not supported"),
        ("text_cfg", {"pool_type": "first"}, "pool_type = 'first' with no_causal_mask = False is not supported"),
        ("text_cfg", {"no_causal_mask": True}, "'argmax' with no_causal_mask = True is not supported"),
        ("text_cfg", {"tokenizer_mode": "clips"}, "text_cfg.tokenizer_mode = 'clips' is not supported"),
    ],
)
def test_the_error_for_an_unsupported_setting_of_open_clip_names_it(tmp_path, section, change, message):
    write(tmp_path, layout=open_clip)
    path = tmp_path / open_clip.CONFIG
    settings = json.loads(path.read_text())
    settings["model_cfg"][section] |= change
    if "timm_model_name" in change:
        settings["model_cfg"][section] = change
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        load(tmp_path, layout=open_clip)


@pytest.mark.parametrize(
    "config, reason",
    [
        (replace(CLIP_TOWERS, image=replace(CLIP_TOWERS.image, stem="residual_conv")), "a convolutional stem"),
        (replace(CLIP_TOWERS, image=replace(CLIP_TOWERS.image, pooling="mean")), "an image tower that averages"),
        (replace(CLIP_TOWERS, text=replace(CLIP_TOWERS.text, pooling="mean")), "a text tower that averages"),
        (
            replace(CLIP_TOWERS, text=replace(CLIP_TOWERS.text, projection_bias=True)),
            "this combination of parts of CLIP and of SigLIP",
        ),
    ],
)
def test_towers_that_other_libraries_cannot_represent_are_refused_with_the_reason(config, reason):
    for layout in (hugging_face, open_clip):
        with pytest.raises(UserError, match=reason):
            layout.write_config(config)


def test_clips_towers_with_a_logit_bias_are_written_for_open_clip_only():
    biased = replace(CLIP_TOWERS, logit_bias=-3.0)
    with pytest.raises(UserError, match="a logit bias with CLIP's towers.*--layouts=open_clip"):
        hugging_face.write_config(biased)
    assert open_clip.write_config(biased) == open_clip.write_config(CLIP_TOWERS) | {"init_logit_bias": -3.0}
    assert any(row.theirs == "logit_bias" for row in open_clip.table(biased, nested=False))


def test_an_end_token_that_transformers_would_misread_is_refused():
    with pytest.raises(UserError, match="end token whose id is 2"):
        hugging_face.write_config(replace(CLIP_TOWERS, text=replace(CLIP_TOWERS.text, end_token=2)))


MEASURE_LOADING = """
import sys, threading, time
from pathlib import Path
import jax, numpy as np
from flax import nnx
from jaxclip.models.clip import CLIP
from jaxclip.models.weights import hugging_face, table

def anonymous_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

checkpoint = hugging_face.read(Path(sys.argv[1]))
shapes = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(CLIP(checkpoint.config, rngs=nnx.Rngs(0)))))
jax.block_until_ready(jax.numpy.zeros(8) + 1)
sizes = [leaf.size * 4 / 2**20 for leaf in jax.tree.leaves(shapes)]
before, peak, running = anonymous_memory(), [0.0], [True]

def watch():
    while running[0]:
        peak[0] = max(peak[0], anonymous_memory())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
params = jax.block_until_ready(table.load(checkpoint.table, checkpoint.tensors, shapes))
running[0] = False
watcher.join()
print(peak[0] - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_needs_at_most_the_memory_of_all_parameters_plus_the_largest_one(tmp_path):
    blocks = replace(BLOCKS, width=512, heads=8, layers=6, mlp_ratio=4.0)
    write(tmp_path, CLIPConfig(ImageConfig(32, 8, blocks), TextConfig(20_000, 12, 63, blocks), 24))
    # Freed memory is returned to the system at once, so that malloc's reserve is not measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", MEASURE_LOADING, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, parameters, largest = map(float, done.stdout.split())
    assert parameters > 150 and largest > 35
    assert peak < parameters + largest, f"{peak:.0f} MiB for {parameters:.0f} MiB, the largest {largest:.0f}"
    assert peak > 0.9 * parameters, "the measurement missed the loading"


def test_opening_a_checkpoint_gives_shapes_and_reads_a_tensor_on_request(tmp_path):
    write(tmp_path)
    tensors = open_tensors(Path(tmp_path), "model.safetensors")
    assert tensors.shapes[LAST] == (32,)
    np.testing.assert_array_equal(tensors.read(LAST), load_file(tmp_path / "model.safetensors")[LAST])
