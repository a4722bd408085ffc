"""A run can start from a published checkpoint or another workdir, and does not need it after the start."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxclip import config
from jaxclip.errors import UserError
from jaxclip.evaluation import pretrained as evaluation
from jaxclip.models.clip import CLIP, CLIPConfig, ImageConfig, TextConfig
from jaxclip.models.transformer import TransformerConfig
from jaxclip.models.weights import hugging_face, open_clip, table
from jaxclip.pipeline import processor, text, trained_groups
from jaxclip.pipeline.batches import image_batches
from jaxclip.pipeline.prepared_data import prepared_dataset
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.records import Records
from jaxclip.towers import sharding
from jaxclip.towers.pretrained import open_pretrained, pretrained_params
from jaxclip.towers.towers import make_towers

BLOCKS = TransformerConfig(width=32, layers=2, heads=2, activation="quick_gelu")
PREPROCESS = Preprocess(32, "crop", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "{name}", False, 24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder with random weights in both layouts, and a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = text.train_tokenizer(["a red cotton shirt", "blue jeans"], 300)
    tokenizer.model_max_length = 24
    text.save_tokenizer(tokenizer, folder)
    towers = CLIPConfig(ImageConfig(32, 8, BLOCKS), TextConfig(300, 24, tokenizer.eos_token_id, BLOCKS), 24)
    random = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(CLIP(towers, rngs=nnx.Rngs(0)))))
    params = jax.tree.map(lambda leaf: (0.3 * random.normal(size=leaf.shape)).astype(np.float32), shapes)
    (folder / "config.json").write_text(json.dumps(hugging_face.write_config(towers)))
    (folder / processor.PROCESSOR).write_text(json.dumps(processor.to_hugging_face(PREPROCESS, "CLIP")))
    save_file(table.save(hugging_face.table(towers), params), folder / hugging_face.WEIGHTS, {"format": "pt"})
    model = {"model_cfg": open_clip.write_config(towers), "preprocess_cfg": processor.to_open_clip(PREPROCESS)}
    (folder / open_clip.CONFIG).write_text(json.dumps(model))
    save_file(table.save(open_clip.table(towers, nested=False), params), folder / open_clip.WEIGHTS)
    return folder


def configured(folder, **settings):
    """Returns a configuration that starts from the folder."""
    defaults = {"steps": 1, "data": {"caption_template": "{name}"}, "model": {"init_from": str(folder)}}
    return config.build({**defaults, **settings})


def start_from(configuration):
    """Returns the towers that a configured run starts from, and their parameters."""
    source = open_pretrained(configuration)
    towers = make_towers(configuration, source.preprocess, source.tokenizer, source.config)
    return towers, pretrained_params(configuration, towers.shapes)[0]


def encoded(towers, params):
    size, length = towers.config.image.size, towers.config.text.context_length
    pixels = np.random.default_rng(1).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    tokens = text.encode(towers.tokenizer, ["a red shirt", "jeans " * 40], length)
    embeddings = nnx.merge(towers.graph, params)(pixels, tokens)
    return np.asarray(embeddings.image), np.asarray(embeddings.text)


def test_both_layouts_of_one_checkpoint_give_the_same_towers(checkpoint, tmp_path):
    copy = tmp_path / "open_clip_alone"
    shutil.copytree(checkpoint, copy)
    for name in ("config.json", "model.safetensors", processor.PROCESSOR):
        (copy / name).unlink()
    (first, params), (second, others) = start_from(configured(checkpoint)), start_from(configured(copy))
    assert first.config == second.config and first.preprocess == second.preprocess == PREPROCESS
    assert first.config.text.transformer.activation == "quick_gelu" and first.config.image.mean == (0.4, 0.5, 0.6)
    jax.tree.map(np.testing.assert_array_equal, params, others)


def test_only_picture_size_and_context_length_may_differ_from_the_checkpoint(checkpoint):
    towers, _ = start_from(configured(checkpoint))
    changed, params = start_from(configured(checkpoint, data={"image_size": 48, "context_length": 40}))
    assert (changed.preprocess.image_size, changed.preprocess.context_length) == (48, 40)
    assert params["image"]["positions"].shape == (37, 32) and params["text"]["positions"].shape == (40, 32)
    assert replace(changed.preprocess, image_size=32, context_length=24, caption_template="{name}") == PREPROCESS
    assert changed.config.image.transformer == towers.config.image.transformer
    with pytest.raises(UserError, match="data.image_size = 44 is not a multiple of the checkpoint's patch, 8"):
        open_pretrained(configured(checkpoint, data={"image_size": 44}))


def test_a_fixed_temperature_comes_from_the_configuration(checkpoint):
    _, learned = start_from(configured(checkpoint))
    _, fixed = start_from(configured(checkpoint, loss={"temperature": 0.05, "learned_temperature": False}))
    scale, learned_scale = float(fixed["logit_scale"]), float(learned["logit_scale"])
    assert scale == pytest.approx(np.log(20), abs=1e-6) != pytest.approx(learned_scale)


def test_captions_are_cleaned_as_the_open_clip_checkpoint_specifies(checkpoint, tmp_path):
    plain, _ = start_from(configured(checkpoint))
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "config.json").unlink()
    settings = json.loads((copy / open_clip.CONFIG).read_text())
    tokenizer_kwargs = settings["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    (copy / open_clip.CONFIG).write_text(json.dumps(settings))
    towers, _ = start_from(configured(copy))
    expected = text.encode(plain.tokenizer, ["a red tshirt"], 24)
    np.testing.assert_array_equal(text.encode(towers.tokenizer, ["  A_Red T-Shirt!"], 24), expected)
    tokenizer_kwargs["strip_sep_token"] = True
    (copy / open_clip.CONFIG).write_text(json.dumps(settings))
    with pytest.raises(UserError, match="tokenizer_kwargs = {'clean': 'canonicalize', 'strip_sep_token': True} is not"):
        start_from(configured(copy))


@pytest.mark.parametrize("source", ["published", "workdir"])
def test_the_sigmoid_loss_adds_the_configured_bias_to_towers_without_one(request, checkpoint, source):
    folder = checkpoint if source == "published" else request.getfixturevalue("trained")
    _, plain = start_from(configured(folder))
    towers, params = start_from(configured(folder, loss={"name": "sigmoid", "bias": -3.0}))
    assert float(params.pop("logit_bias")) == -3.0 == towers.config.logit_bias and "logit_bias" not in plain
    jax.tree.map(np.testing.assert_array_equal, params, plain)


def test_parameters_are_sharded_as_the_mesh_requires(checkpoint):
    towers, params = start_from(configured(checkpoint, mesh={"data": 2, "fsdp": 2, "tensor": 2}))
    expected = sharding.shardings(params, towers.mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, target: leaf.sharding == target, params, expected)))
    _, whole = start_from(configured(checkpoint))
    jax.tree.map(np.testing.assert_array_equal, params, whole)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"data": {"mean": (0.5, 0.5, 0.5)}}, "data.mean comes from model.init_from: leave it out"),
        ({"model": {"init_from": "x/y", "preset": "tiny"}}, "model.preset comes from model.init_from: leave it out"),
        ({"data": {"image_size": 4}}, "data.image_size = 4 must be 0 or at least 8"),
        ({"evaluation": {"ks": (3, 5)}}, r"evaluation.ks = \(3, 5\) must be depths >= 1 that include 1"),
    ],
)
def test_fields_that_the_checkpoint_determines_cannot_be_configured(checkpoint, settings, message):
    with pytest.raises(UserError, match=message):
        configured(checkpoint, **settings)


def test_a_name_that_is_neither_a_folder_nor_a_repository_is_refused():
    for name in ("no/such/folder", "./missing", "../up/here", "nothing"):
        with pytest.raises(UserError, match="is neither a folder nor a name on the Hugging Face hub"):
            open_pretrained(configured(name))


def test_a_tokenizer_whose_end_token_differs_from_the_towers_is_refused(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    settings = json.loads((copy / "config.json").read_text())
    settings["text_config"]["eos_token_id"] = 7
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        UserError, match=r"read the token 7 as the end of a caption, but the tokenizer of .* ends captions with 1"
    ):
        open_pretrained(configured(copy))


@pytest.mark.slow
def test_a_run_starts_from_a_checkpoint_and_others_from_its_workdir_and_export(run, checkpoint, config_file, tmp_path):
    source, first, second = tmp_path / "source", tmp_path / "first", tmp_path / "second"
    shutil.copytree(checkpoint, source)
    settings = config_file.read_text().replace('"image_size": 32, "context_length": 12, "vocab_size": 300, ', "")
    settings = settings.replace('"preset": "tiny"', f'"init_from": {str(source)!r}')
    fine_tune = tmp_path / "fine_tune.py"
    fine_tune.write_text(settings)
    done = run("train", f"--config={fine_tune}", f"--workdir={first}", "--config.evaluation.ks=(1, 3, 20)")
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    zero, tuned = (next(i for i, row in enumerate(rows) if row.startswith(n)) for n in ("zero-shot", "fine-tuned"))
    assert zero + 1 == tuned and "R@1     R@3    R@20" in rows[zero - 1]
    before = json.loads((first / "eval" / "zero_shot" / "metrics.json").read_text())
    assert before["checkpoint_step"] == 0 and f"{before['text_to_image']['hit@20']['value']:.3f}" in rows[zero]
    assert all("hit@20" in row for row in before["by_category"].values())

    shutil.rmtree(source)  # the workdir no longer needs it
    again = run("evaluate", f"--workdir={first}")
    assert again.returncode == 0, again.stderr

    exported = tmp_path / "exported"
    done = run("export", f"--workdir={first}", f"--output={exported}", "--layouts=transformers,open_clip")
    assert done.returncode == 0, done.stderr
    for folder in (first, exported):
        done = run("train", f"--config={fine_tune}", f"--workdir={second}", f"--config.model.init_from={folder}")
        assert done.returncode == 0, done.stderr
        zero_shot = json.loads((second / "eval" / "zero_shot" / "metrics.json").read_text())["text_to_image"]
        after = json.loads((first / "eval" / "test" / "metrics.json").read_text())["text_to_image"]
        assert zero_shot["hit@1"] == after["hit@1"] and zero_shot["mrr"] == after["mrr"]
        shutil.rmtree(second)

    refused = run("export", f"--workdir={first}", f"--output={exported}")
    assert refused.returncode == 2 and "is not empty: give a new folder" in refused.stderr


DRAWN = {"drawn_products": 48, "test": 16.0, "caption_template": "{name}"}


def brute_force(towers, params, records):
    """Returns the share of captions whose most similar picture is of their group, ties being wrong."""
    pixels = np.concatenate(list(image_batches(records, towers.preprocess, batch_size=len(records))))
    products, groups = zip(*records.products(), strict=True)
    captions = [text.caption(product.captions[0], product.attributes, towers.preprocess) for product in products]
    tokens = text.encode(towers.tokenizer, captions, towers.preprocess.context_length)
    with jax.set_mesh(towers.mesh):
        embeddings = nnx.merge(towers.graph, params)(pixels, tokens)
    scores = np.asarray(embeddings.text, np.float64) @ np.asarray(embeddings.image, np.float64).T
    relevant = np.equal.outer(groups, groups)
    best_relevant, best_other = (np.where(mask, scores, -np.inf).max(axis=1) for mask in (relevant, ~relevant))
    return float((best_relevant > best_other + 1e-7).mean())


def test_a_published_checkpoint_is_evaluated_as_it_is_without_a_workdir(checkpoint, quick_compilation, tmp_path):
    settings, lines = configured(checkpoint, data=DRAWN), []
    metrics, folder = evaluation.evaluate_pretrained(
        settings, tmp_path / "here", command="python -m jaxclip.evaluate", say=lines.append
    )
    assert folder == tmp_path / "here" and (folder / "report.html").exists()
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert (metrics["checkpoint_step"], metrics["parameters"], metrics["gallery"]) == (0, "raw", 16)
    assert metrics["notes"] == [] and not any("trained_groups" in line for line in lines)
    towers, params = start_from(settings)
    records = Records(prepared_dataset(settings, say=pytest.fail), "test")
    assert metrics["text_to_image"]["hit@1"]["value"] == pytest.approx(brute_force(towers, params, records))


@pytest.mark.slow
def test_an_export_is_evaluated_without_the_products_that_its_run_was_trained_on(
    checkpoint, quick_compilation, tmp_path
):
    settings = configured(checkpoint, data=DRAWN)
    prepared = prepared_dataset(settings, say=print)
    half = Records(prepared, "test").take(np.arange(5))
    export = tmp_path / "export"
    shutil.copytree(checkpoint, export)
    trained_groups.write(export, trained_groups.keys_of(prepared, half))
    metrics, _ = evaluation.evaluate_pretrained(
        configured(export, data=DRAWN), tmp_path / "here", command="", say=lambda line: None
    )
    left_out = int(np.isin(Records(prepared, "test").groups(), half.groups()).sum())
    assert metrics["gallery"] == 16 - left_out <= 11
    assert metrics["notes"][0].startswith(
        f"{left_out} of 16 products of the split test are in groups that were trained"
    )


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"model": {"init_from": "openai/clip-vit-base-patch32"}}, "openai-clip-vit-base-patch32-drawn-4000-test"),
        ({"model": {"init_from": "/runs/a run/"}, "data": {"split": "all"}}, "runs-a-run-drawn-4000-all"),
        ({"model": {"init_from": "x"}, "data": {"reader": "folder", "path": "/shops/one"}}, "x-one-test"),
    ],
)
def test_results_without_a_workdir_are_in_a_folder_named_after_checkpoint_catalogue_and_split(settings, name):
    assert evaluation.default_folder(config.build({"steps": 1, **settings})) == Path("evaluations") / name


def test_without_a_checkpoint_there_is_nothing_to_evaluate(tmp_path):
    with pytest.raises(UserError, match=r"nothing to evaluate: give the --workdir .* --config\.model\.init_from"):
        evaluation.evaluate_pretrained(config.build({"steps": 1}), tmp_path, command="", say=print)


@pytest.mark.slow
def test_evaluate_ranks_a_published_checkpoint_and_a_workdir_with_a_config_without_steps(
    run, trained, checkpoint, tmp_path
):
    file = tmp_path / "as_it_is.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        "    return ConfigDict({'data': {'drawn_products': 150, 'test': 0.2}, 'evaluation': {'batch_size': 32}})\n"
    )
    for source, output in ((checkpoint, tmp_path / "published"), (trained, tmp_path / "workdir")):
        arguments = [f"--config={file}", f"--config.model.init_from={source}", f"--output={output}"]
        done = run("evaluate", *arguments, "--config.steps=0")
        assert done.returncode == 0, done.stderr
        assert f"{source}, without training" in done.stdout and str(output / "metrics.json") in done.stdout
        metrics = json.loads((output / "metrics.json").read_text())
        assert metrics["queries"] == 30
        assert "--config.model.init_from=" in (output / "report.html").read_text()
    of_run = json.loads((trained / "eval" / "test" / "metrics.json").read_text())
    assert metrics["text_to_image"] == of_run["text_to_image"] and metrics["checkpoint_step"] == 12
