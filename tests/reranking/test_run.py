"""A re-ranker on real towers: which products it learns from, what it refuses, that it resumes and can be moved."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxclip import config as configs
from jaxclip.config.rerank_section import Rerank
from jaxclip.errors import UserError
from jaxclip.pipeline import prepared_data, text
from jaxclip.pipeline.records import Records
from jaxclip.reranking import first_stage
from jaxclip.reranking.data import FILENAME, embedded, find_first_stage, retrieve, training_records
from jaxclip.reranking.reranker import Scorer, batch_rows, make_recipe, make_reranker
from jaxclip.reranking.run import RerankEvaluator
from jaxclip.towers.encoders import Encoders
from jaxclip.training import recipe
from jaxclip.training.state import initial_state

pytestmark = pytest.mark.slow

CONFIG = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.task, config.first_stage = "rerank", "{towers}"
    config.batch_size, config.steps, config.log_every = 8, 6, 1
    config.rerank = ConfigDict({{"candidates": 20, "wordings": 2, "features": "hubness,image,crop,colour,attributes"}})
    config.checkpoint = ConfigDict({{"every": 2, "keep": 3}})
    config.optimizer = ConfigDict({{"warmup_steps": 1, "learning_rate": 0.01}})
    return config
"""


@pytest.fixture(scope="module")
def towers(run, config_file, tmp_path_factory) -> Path:
    """Towers that were trained without 40 of the 120 training products."""
    workdir = tmp_path_factory.mktemp("towers") / "run"
    done = run("train", f"--config={config_file}", f"--workdir={workdir}", "--config.data.second_stage=40")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def rerank_file(towers, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "rerank.py"
    path.write_text(CONFIG.format(towers=towers))
    return path


@pytest.fixture(scope="module")
def reranked(run, rerank_file, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("reranked") / "run"
    done = run("train", f"--config={rerank_file}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "improved" in done.stdout and "first stage" in done.stdout
    return workdir


@pytest.fixture(scope="module")
def prepared(towers) -> Path:
    return prepared_data.prepared_dataset(
        configs.load_config(towers), say=lambda line: pytest.fail(f"the dataset was prepared again: {line}")
    )


def groups_of(records):
    return {group for _, group in records.products()}


def test_a_reranker_learns_from_exactly_the_products_that_its_towers_never_saw(towers, reranked, prepared):
    own = configs.load_config(towers)
    seen, held = prepared_data.training_records(own, prepared)
    everything = Records(prepared, "train")
    assert len(held) == 40 and len(seen) + len(held) == len(everything) == 90
    assert not groups_of(seen) & groups_of(held)
    assert not groups_of(held) & groups_of(Records(prepared, "test"))
    ids = {product.id for product, _ in seen.products()} | {product.id for product, _ in held.products()}
    assert ids == {product.id for product, _ in everything.products()}
    first = first_stage.load(towers, own)
    records = training_records(configs.load_config(reranked), first, prepared)
    assert sorted(records.groups()) == sorted(group for _, group in held.products())


@pytest.fixture(scope="module")
def evaluator(towers, reranked, prepared):
    """Returns the test products as a re-ranker evaluates them, its configuration and its towers."""
    config = configs.load_config(reranked)
    first = first_stage.load(towers, configs.load_config(towers))
    return RerankEvaluator(config, first, prepared, reranked, Records(prepared, "test")), config, first


def test_an_untrained_reranker_gives_the_first_stages_order_bit_for_bit(evaluator):
    evaluated, config, first = evaluator
    mesh, scores = first.towers.mesh, {}
    for preset in ("gated", "trained"):
        model = make_reranker(config, evaluated.split, mesh=mesh, logit_scale=first.logit_scale)
        recipe = make_recipe(config, model, 1)
        state = initial_state(model.config, recipe.optimizer, recipe.state, model.trainable, seed=3, model=model.model)
        params = state.params
        if preset == "trained":
            params = jax.tree.map(lambda leaf: leaf + 0.1, params)
        retrieved = retrieve(config, evaluated.split)
        with jax.set_mesh(mesh):
            scores[preset] = Scorer(model, evaluated.split, retrieved, batch_size=8)(params)
    assert scores["gated"].tobytes() == np.ascontiguousarray(retrieved.scores).tobytes()
    assert scores["trained"].tobytes() != scores["gated"].tobytes()
    after = retrieved.reordered(scores["gated"])
    np.testing.assert_array_equal(after.ranks, retrieved.first.ranks)
    np.testing.assert_array_equal(after.top_items, retrieved.items)


def test_evaluation_never_sees_an_answer_that_the_first_stage_did_not_retrieve(evaluator):
    evaluated, config, _ = evaluator
    split = evaluated.split
    found = retrieve(replace(config, rerank=replace(config.rerank, candidates=3)), split)
    cosines = split.queries @ split.images.T
    np.testing.assert_allclose(found.scores, -np.sort(-cosines, axis=1)[:, :3], atol=1e-6)
    answers = split.groups[split.owners]
    retrieved = (split.groups[np.argsort(-cosines, axis=1)[:, :3]] == answers[:, None]).any(axis=1)
    np.testing.assert_array_equal(found.found, retrieved)
    assert 0 < retrieved.sum() < len(retrieved)


def test_a_long_caption_is_read_in_segments(evaluator):
    _, _, first = evaluator
    encoders = Encoders(first.towers, batch_size=8)
    long, short = "a red cotton shirt with long sleeves and a blue collar, worn in summer by men and women", "red shirt"
    with jax.set_mesh(first.towers.mesh):
        cut, whole = (
            encoders.captions(first.params, [long, short]),
            encoders.segmented(first.params, [long, short], 9),
        )
        tokens = encoders.segmented(first.params, [long, short], 9, tokens=True)
        parts = text.segments(first.towers.tokenizer, [long], first.towers.preprocess.context_length, 9)
        vectors = np.asarray(encoders.text(first.params, np.resize(parts.ids, (8, parts.ids.shape[1]))))
    assert 1 < len(parts.ids) < 8
    np.testing.assert_allclose(whole[1], cut[1], atol=1e-6)
    mean = (vectors[: len(parts.ids)] * parts.lengths[:, None]).sum(axis=0)
    np.testing.assert_allclose(whole[0], mean / np.linalg.norm(mean), atol=1e-5)
    assert np.abs(whole[0] - cut[0]).max() > 1e-3
    assert tokens.shape[1] == 9 * parts.ids.shape[1]
    read = (tokens != 0).any(axis=-1).sum(axis=1)
    assert read.tolist() == [parts.lengths.sum(), len(first.towers.tokenizer(short)["input_ids"])]


def test_towers_train_only_on_the_products_that_are_not_held_back(towers):
    rows = [json.loads(line) for line in (towers / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) >= 12  # the run is given in steps; an epoch is a pass over the products that are not held back
    own = configs.load_config(towers)
    by_epochs = configs.build(configs.dump(own) | {"steps": 0, "epochs": 2.0})
    (prepared,) = {prepared_data.prepared_dataset(own, whole=False, say=print)}
    seen, _ = prepared_data.training_records(own, prepared)
    assert recipe.number_of_steps(by_epochs, seen) == round(2 * 50 / 16)


def test_towers_that_saw_every_product_are_refused(run, trained, rerank_file, tmp_path):
    done = run("train", f"--config={rerank_file}", f"--workdir={tmp_path / 'r'}", f"--config.first_stage={trained}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "held back 0" in done.stderr and "--config.data.second_stage=0.1" in done.stderr
    assert not (tmp_path / "r" / "checkpoints" / "0").exists()


def test_the_first_stages_metrics_are_those_of_its_own_evaluation(towers, reranked):
    own = json.loads((towers / "eval" / "test" / "metrics.json").read_text())
    both = json.loads((reranked / "eval" / "test" / "metrics.json").read_text())
    expected = {name: figure["value"] for name, figure in own["text_to_image"].items()}
    assert {name: figure["value"] for name, figure in both["first_stage"].items()} == pytest.approx(expected)
    assert both["text_to_image"] != both["first_stage"] and both["image_to_text"] == own["image_to_text"]
    assert both["reranked"]["k"] == 20 and both["queries"] == own["queries"] == 30
    compared = both["reranked"]["compared"]["hit@5"]
    assert compared["difference"] == pytest.approx(
        both["text_to_image"]["hit@5"]["value"] - both["first_stage"]["hit@5"]["value"]
    )
    pairs = both["pairs"]
    expected = {name: figure["value"] for name, figure in own["pairs"]["text_to_image"].items()}
    assert {name: figure["value"] for name, figure in pairs["first_stage"].items()} == pytest.approx(expected)
    assert pairs["chance"] == own["pairs"]["chance"] and "image_to_text" not in pairs
    for name in ("single", "image_to_image", "trials"):
        assert "this evaluation is re-ranked" in both[name]["reason"]
    page = (reranked / "eval" / "test" / "report.html").read_text()
    assert "Comparison with the first stage" in page and "Improved most" in page
    assert "pairs, first stage" in page and "pairs, re-ranked" in page


def test_pairs_of_a_reranker_equal_sorting_its_candidates(evaluator):
    evaluated, config, first = evaluator
    split, mesh = evaluated.split, first.towers.mesh
    model = make_reranker(config, split, mesh=mesh, logit_scale=first.logit_scale)
    recipe = make_recipe(config, model, 1)
    state = initial_state(model.config, recipe.optimizer, recipe.state, model.trainable, seed=3, model=model.model)
    params = jax.tree.map(lambda leaf: leaf + 0.1, state.params)
    retrieved = retrieve(config, split)
    with jax.set_mesh(mesh):
        figures, _ = evaluated.complete(model, params)
        scores = Scorer(model, split, retrieved, batch_size=8)(params)
    found = figures["pairs"]
    ranks = {"first_stage": [], "text_to_image": []}
    cosines = split.queries @ split.images.T
    for query, own in enumerate(split.owners):
        items = retrieved.items[query]
        before = 1 + int((cosines[query] > cosines[query, own]).sum())
        ranks["first_stage"].append(before)
        inside = np.flatnonzero(items == own)
        ranks["text_to_image"].append(1 + int((scores[query] > scores[query, inside]).sum()) if len(inside) else before)
    for stage, places in ranks.items():
        for k in (1, 5, 10):
            assert found[stage][f"hit@{k}"]["value"] == pytest.approx(np.mean(np.array(places) <= k)), (stage, k)
        assert found[stage]["mrr"]["value"] == pytest.approx(np.mean(1 / np.array(places)))
    assert ranks["first_stage"] != ranks["text_to_image"]
    compared = found["reranked"]["compared"]["mrr"]
    assert compared["difference"] == pytest.approx(found["text_to_image"]["mrr"]["value"] - compared["baseline"])
    assert found["reranked"]["retrieved"]["value"] == pytest.approx(np.mean(np.array(ranks["first_stage"]) <= 20))
    for name, ceiling in found["ceiling"].items():
        assert found["text_to_image"][name]["value"] <= ceiling


def test_a_killed_run_ends_where_an_uninterrupted_one_does(run, rerank_file, reranked, read_params, tmp_path):
    workdir = tmp_path / "killed"
    shutil.copytree(reranked, workdir)
    for step in (4, 6):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    shutil.rmtree(workdir / "eval")
    done = run("train", f"--config={rerank_file}", f"--workdir={workdir}")
    assert done.returncode == 0 and "resuming from step 2" in done.stderr, done.stderr
    for name, leaf in read_params(reranked, 6).items():
        np.testing.assert_array_equal(read_params(workdir, 6)[name], leaf, err_msg=name)


def test_a_moved_first_stage_is_named_again_and_other_towers_are_refused(run, reranked, towers, trained, tmp_path):
    workdir, moved = tmp_path / "elsewhere", tmp_path / "towers"
    shutil.copytree(reranked, workdir, ignore=shutil.ignore_patterns("eval"))
    shutil.copytree(towers, moved)
    done = run("evaluate", f"--workdir={workdir}", f"--config.first_stage={moved}")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((workdir / "eval" / "test" / "metrics.json").read_text())
    assert metrics == json.loads((reranked / "eval" / "test" / "metrics.json").read_text())
    config = configs.load_config(reranked, {"first_stage": str(trained)})
    saved = json.loads((reranked / FILENAME).read_text())["fingerprint"]
    with pytest.raises(UserError) as error:
        find_first_stage(config, reranked)
    other = first_stage.load(trained, configs.load_config(trained)).fingerprint
    assert saved in str(error.value) and other in str(error.value) and saved != other


def test_splits_with_equally_many_records_have_caches_of_their_own(evaluator, prepared):
    evaluated, config, first = evaluator
    train = embedded(config, first, prepared, Records(prepared, "train", len(evaluated.records)))
    assert len(train.groups) == len(evaluated.split.groups)
    assert not set(train.groups) & set(evaluated.split.groups)


def test_the_towers_are_placed_on_the_configured_mesh(evaluator, reranked, prepared):
    one, config, _ = evaluator
    split_up = replace(config, mesh=replace(config.mesh, fsdp=2))
    first = find_first_stage(split_up, reranked)
    assert dict(first.towers.mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    found = embedded(split_up, first, prepared, one.records)
    np.testing.assert_allclose(found.queries, one.split.queries, atol=1e-5)


def test_preprocessing_that_differs_from_the_towers_is_refused(reranked):
    config = configs.load_config(reranked)
    other = replace(config, data=replace(config.data, image_size=64, lowercase=False))
    with pytest.raises(UserError, match=r"data\.image_size, data\.lowercase cannot be changed after the training"):
        find_first_stage(other, reranked)


def test_the_rows_of_a_step_depend_only_on_seed_and_step():
    whole = list(batch_rows(10, 4, 3, range(9)))
    again = list(batch_rows(10, 4, 3, range(5, 9)))
    np.testing.assert_array_equal(whole[5:], again)
    stream = np.concatenate(whole)
    assert all(sorted(stream[start : start + 10]) == list(range(10)) for start in (0, 10, 20))
    assert not np.array_equal(stream[:10], stream[10:20])


def test_an_ablation_compares_its_subsets_and_is_not_done_twice(run, rerank_file, tmp_path):
    arguments = (
        "train",
        f"--config={rerank_file}",
        f"--workdir={tmp_path / 'a'}",
        "--config.rerank.ablation={'both': 'hubness,image', 'colour': 'colour'}",
    )
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a" / "ablation.json").read_text())
    assert list(result["subsets"]) == ["both", "colour"] and set(result["subsets"]["colour"]["p"]) == {
        "first stage",
        "both",
    }
    assert all(name in done.stdout for name in ("first stage", "both", "colour", "p to both", "split validation, "))
    assert result["split"] == "validation", "features must not be chosen on the products that are reported"
    assert sorted(path.name for path in (tmp_path / "a" / "both-seed-0" / "eval").iterdir()) == ["validation"]
    again = run(*arguments)
    assert again.returncode == 0 and again.stdout == done.stdout and "compiling" not in again.stderr


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "paper", "loss": "binary", "negatives": "mixed", "batch_norm": "true"},
        {"preset": "cross_attention", "hidden": "16", "heads": "2", "layers": "1", "sampled": "5"},
        {
            "preset": "cross_attention",
            "hidden": "16",
            "heads": "2",
            "layers": "1",
            "loss": "contrastive",
            "segments": 2,
        },
    ],
    ids=["paper", "cross-attention", "contrastive, in segments"],
)
def test_the_other_networks_train_and_are_evaluated(run, rerank_file, read_params, tmp_path, options):
    """Two steps may not change the order of 30 queries' candidates, but they do change weights that start at zero."""
    options = {"features": Rerank().features, **options}
    overrides = [f"--config.rerank.{name}={value}" for name, value in options.items()]
    done = run("train", f"--config={rerank_file}", f"--workdir={tmp_path / 'r'}", "--config.steps=2", *overrides)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "r" / "eval" / "test" / "metrics.json").read_text())
    assert metrics["checkpoint_step"] == 2 and metrics["text_to_image"].keys() == metrics["first_stage"].keys()
    if options["preset"] == "paper":
        assert metrics["text_to_image"] != metrics["first_stage"]
    else:
        assert np.all(read_params(tmp_path / "r", 2)["['out']['kernel']"] != 0)
