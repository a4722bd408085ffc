"""A perfect encoder scores 1, a random encoder scores chance, and NaN scores are counted."""

import json

import numpy as np
import pytest
from scipy.stats import beta, binom

from jaxclip.errors import UserError
from jaxclip.evaluation import protocols
from jaxclip.ranking import trials


def evaluate(texts, images, text_groups, image_groups, categories, **options):
    grouped = protocols.GroupedEmbeddings(texts, text_groups), protocols.GroupedEmbeddings(images, image_groups)
    return protocols.evaluate(*grouped, categories, **options)


def unit_vectors(seed, size, width=64):
    embeddings = np.random.default_rng(seed).normal(size=(size, width))
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def names(size):
    return [f"product {i}" for i in range(size)]


def test_a_perfect_encoder_scores_one_in_every_protocol():
    embeddings = unit_vectors(0, 150)
    result, details = evaluate(embeddings, embeddings, names(150), names(150), ["shoes"] * 100 + ["bags"] * 50)
    for part in (result, result["trials"]):
        for direction in ("text_to_image", "image_to_text"):
            for k in (1, 5, 10):
                assert part[direction][f"hit@{k}"] == {"value": 1.0, "low": 1.0, "high": 1.0}
            assert part[direction]["map"]["value"] == 1.0
    assert result["text_to_image"]["mrr"]["value"] == result["text_to_image"]["median_rank"]["value"] == 1.0
    assert list(result["by_category"]) == ["shoes", "bags"]
    assert result["by_category"]["bags"]["queries"] == 50
    assert result["by_category"]["bags"]["hit@1"]["value"] == 1.0
    assert details.text_to_image.top_relevant[:, 0].all() and not details.text_to_image.top_relevant[:, 1:].any()


def test_a_random_encoder_scores_chance_within_its_interval():
    result, _ = evaluate(unit_vectors(1, 600), unit_vectors(2, 600), names(600), names(600), [""] * 600)
    assert result["chance"]["hit@10"] == pytest.approx(10 / 600)
    for k in (5, 10):
        for direction, chance in (("text_to_image", "chance"), ("image_to_text", "chance_image_to_text")):
            figure = result[direction][f"hit@{k}"]
            assert figure["low"] <= result[chance][f"hit@{k}"] <= figure["high"]
    for k in (1, 5, 10):
        figure = result["trials"]["text_to_image"][f"hit@{k}"]
        assert abs(figure["value"] - k / 100) < 0.02 and figure["low"] < figure["value"] < figure["high"]
    expected_map = (1.0 / np.arange(1, 101)).sum() / 100  # the mean of 1 / rank for uniform ranks
    assert abs(result["trials"]["text_to_image"]["map"]["value"] - expected_map) < 0.005
    assert list(result["by_category"]) == ["(none)"]


@pytest.mark.parametrize("cosine", [0.5, 0.7, 0.9])
def test_trials_agree_with_the_closed_form_for_a_known_cosine(cosine):
    """All matching pairs have this cosine, and the other pairs are independent random points on the sphere."""
    width, size = 8, 3000
    images, noise = unit_vectors(5, size, width), np.random.default_rng(6).normal(size=(size, width))
    noise -= (noise * images).sum(axis=1, keepdims=True) * images
    texts = cosine * images + np.sqrt(1 - cosine**2) * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    exceeding = beta.sf((1 + cosine) / 2, (width - 1) / 2, (width - 1) / 2)
    best_ranks = trials.best_ranks(
        texts.astype(np.float32), images.astype(np.float32), np.arange(size), np.arange(size)
    )
    for ranks in best_ranks:
        for k in (1, 5, 10):
            expected = binom.cdf(k - 1, trials.SIZE - 1, exceeding)
            assert (ranks <= k).mean() == pytest.approx(expected, abs=0.015)
        assert (1 / ranks).mean() == pytest.approx(
            sum(binom.pmf(n, trials.SIZE - 1, exceeding) / (n + 1) for n in range(trials.SIZE)), abs=0.015
        )


def test_a_constant_encoder_finds_nothing():
    same = np.repeat(unit_vectors(3, 1), 120, axis=0)
    result, _ = evaluate(same, same, names(120), names(120), ["a"] * 120)
    assert result["text_to_image"]["hit@10"]["value"] == result["trials"]["text_to_image"]["hit@10"]["value"] == 0.0
    assert result["text_to_image"]["median_rank"]["value"] == 120


def test_all_captions_and_images_of_one_group_are_relevant_to_each_other():
    images, image_groups = unit_vectors(4, 6), ["a", "a", "b", "c", "d", "e"]
    texts, text_groups = images[[0, 2, 2, 3, 4, 5, 1]], ["a", "b", "b", "c", "d", "e", "a"]
    result, details = evaluate(texts, images, text_groups, image_groups, ["x"] * 7, ks=(1, 2))
    assert (result["queries"], result["gallery"]) == (7, 6)
    assert result["text_to_image"]["hit@1"]["value"] == result["image_to_text"]["hit@1"]["value"] == 1.0
    assert details.text_to_image.relevant_counts.tolist() == [2, 1, 1, 1, 1, 1, 2]
    assert details.image_to_text.top_items[2, :2].tolist() == [1, 2]


def test_too_few_groups_for_trials_give_a_reason_instead_of_figures():
    result, _ = evaluate(unit_vectors(5, 40), unit_vectors(5, 40), names(40), names(40), ["a"] * 40)
    assert list(result["trials"]) == ["reason"] and "there are 40" in result["trials"]["reason"]


def test_nan_scores_are_counted_and_rank_last():
    images = unit_vectors(6, 120)
    images[7] = np.nan
    result, details = evaluate(unit_vectors(6, 120), images, names(120), names(120), ["a"] * 120)
    assert result["nan_scores"] == 120
    assert details.text_to_image.best_ranks[7] == 120
    assert details.image_to_text.best_ranks[7] == 120
    assert result["text_to_image"]["hit@1"]["value"] == pytest.approx(119 / 120)


def test_equal_seeds_give_equal_json():
    arguments = unit_vectors(7, 130), unit_vectors(8, 130), names(130), names(130), ["a"] * 130
    first, again, other = (json.dumps(evaluate(*arguments, seed=seed)[0]) for seed in (0, 0, 1))
    assert first == again != other


def test_an_image_without_a_text_is_refused_by_name():
    with pytest.raises(UserError, match="1 of 3 queries .*product 2"):
        evaluate(unit_vectors(9, 2), unit_vectors(9, 3), names(2), names(3), ["a"] * 2)
    with pytest.raises(ValueError, match="2 texts with 3 groups"):
        evaluate(unit_vectors(9, 2), unit_vectors(9, 3), names(3), names(3), ["a"] * 2)
