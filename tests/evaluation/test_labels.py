"""Label retrieval and zero-shot classification agree with scikit-learn and with sorting."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, ndcg_score

from jaxclip.evaluation import labels

LABELS, IMAGES = 7, 300


@pytest.fixture(scope="module")
def case():
    """Random (field, label embeddings, image embeddings): images lie near their label's vector; some have no label."""
    random = np.random.default_rng(0)
    names = [f"colour {n}" for n in range(LABELS)]
    image_labels = random.choice([*names, ""], IMAGES, p=[0.3, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.1])
    (field,) = labels.fields({"baseColour": list(image_labels)})
    embeddings = random.standard_normal((LABELS, 16)).astype(np.float32)
    images = embeddings[field.members] + 2 * random.standard_normal((IMAGES, 16)).astype(np.float32)
    embeddings, images = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (embeddings, images))
    return field, embeddings, images


def test_only_fields_with_several_frequent_values_have_labels():
    colours = ["red"] * 5 + ["blue"] * 6 + ["lime"] * 4 + [""] * 9
    fields = labels.fields({
        "colour": colours,
        "name": [f"product {n}" for n in range(24)],
        "gender": ["men"] * 24,
        "id": [str(n // 5) for n in range(24)],
    })  # fmt: skip
    assert [field.name for field in fields] == ["colour", "id"]
    assert fields[0].labels == ["blue", "red"]
    np.testing.assert_array_equal(fields[0].members, [1] * 5 + [0] * 6 + [-1] * 13)
    too_many = [str(n // 5) for n in range(5 * (labels.MAX_LABELS + 1))]
    assert not labels.fields({"names": too_many})


def test_an_ensemble_is_the_normalised_mean_of_its_prompts():
    prompts = np.array([[[1, 0], [0, 1]], [[1, 0], [1, 0]]], np.float32)
    np.testing.assert_allclose(labels.ensemble(prompts), [[0.5**0.5, 0.5**0.5], [1, 0]], rtol=1e-6)


def test_classification_figures_equal_scikit_learns(case):
    field, embeddings, images = case
    known = field.members >= 0
    predicted = (images @ embeddings.T).argmax(axis=1)[known]
    actual = field.members[known]
    figures = labels.classify(field, embeddings, images)
    assert figures["products"] == known.sum() < IMAGES
    assert figures["accuracy"]["value"] == pytest.approx((predicted == actual).mean(), abs=1e-12)
    for name, average in (("weighted_f1", "weighted"), ("macro_f1", "macro")):
        assert figures[name]["value"] == pytest.approx(f1_score(actual, predicted, average=average), abs=1e-12)
        assert figures[name]["low"] < figures[name]["value"] < figures[name]["high"]
    assert figures["weighted_f1"]["value"] != figures["macro_f1"]["value"]


def test_labels_that_do_not_occur_are_excluded_from_the_mean_f1():
    pair = np.array([[0, 0, 1], [0, 1, 1]], np.float64)
    for weighted, average in ((True, "weighted"), (False, "macro")):
        (value,) = labels.f1(pair, np.ones((1, 3)), 5, weighted=weighted)
        assert value == pytest.approx(f1_score(pair[0], pair[1], average=average), abs=1e-12)


def test_label_retrieval_equals_sorting_all_images(case):
    field, embeddings, images = case
    scores = embeddings @ images.T
    relevant = field.members == np.arange(LABELS)[:, None]
    figures = labels.retrieve(field, embeddings, images)
    assert (figures["queries"], figures["gallery"]) == (LABELS, IMAGES)
    ordered = np.take_along_axis(relevant, np.argsort(-scores, axis=1), axis=1)
    expected = {
        "precision@1": ordered[:, 0].mean(),
        "precision@10": ordered[:, :10].mean(),
        "map": np.mean([average_precision_score(*row) for row in zip(relevant, scores, strict=True)]),
        "mrr": (1 / (1 + ordered.argmax(axis=1))).mean(),
        "ndcg@10": ndcg_score(relevant, scores, k=10),
    }
    for name, value in expected.items():
        assert figures[name]["value"] == pytest.approx(value, abs=1e-9), name
