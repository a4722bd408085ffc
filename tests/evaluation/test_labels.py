"""Label retrieval and zero-shot classification agree with scikit-learn and plain sorting."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, ndcg_score

from jaxclip.evaluation import labels

LABELS, IMAGES = 7, 300


@pytest.fixture(scope="module")
def drawn():
    """Random (field, label embeddings, images): images lie near the vector of their label, and some have no label."""
    random = np.random.default_rng(0)
    names = [f"colour {n}" for n in range(LABELS)]
    of_images = random.choice([*names, ""], IMAGES, p=[0.3, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.1])
    (field,) = labels.fields({"baseColour": list(of_images)})
    embeddings = random.standard_normal((LABELS, 16)).astype(np.float32)
    images = embeddings[field.members] + 2 * random.standard_normal((IMAGES, 16)).astype(np.float32)
    embeddings, images = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (embeddings, images))
    return field, embeddings, images


def test_only_fields_with_several_frequent_values_hold_labels():
    shared = ["red"] * 5 + ["blue"] * 6 + ["lime"] * 4 + [""] * 9
    found = labels.fields({
        "colour": shared,
        "name": [f"product {n}" for n in range(24)],
        "gender": ["men"] * 24,
        "id": [str(n // 5) for n in range(24)],
    })  # fmt: skip
    assert [field.name for field in found] == ["colour", "id"]
    assert found[0].labels == ["blue", "red"]
    np.testing.assert_array_equal(found[0].members, [1] * 5 + [0] * 6 + [-1] * 13)
    many = [str(n // 5) for n in range(5 * (labels.MAX_LABELS + 1))]
    assert not labels.fields({"names": many})


def test_an_ensemble_is_the_normalised_mean_of_its_prompts():
    prompts = np.array([[[1, 0], [0, 1]], [[1, 0], [1, 0]]], np.float32)
    np.testing.assert_allclose(labels.ensemble(prompts), [[0.5**0.5, 0.5**0.5], [1, 0]], rtol=1e-6)


def test_classification_figures_equal_those_of_scikit_learn(drawn):
    field, embeddings, images = drawn
    known = field.members >= 0
    predicted = (images @ embeddings.T).argmax(axis=1)[known]
    actual = field.members[known]
    found = labels.classify(field, embeddings, images)
    assert found["images"] == known.sum() < IMAGES
    assert found["accuracy"]["value"] == pytest.approx((predicted == actual).mean(), abs=1e-12)
    for name, average in (("weighted_f1", "weighted"), ("macro_f1", "macro")):
        assert found[name]["value"] == pytest.approx(f1_score(actual, predicted, average=average), abs=1e-12)
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert found["weighted_f1"]["value"] != found["macro_f1"]["value"]


def test_labels_that_do_not_occur_are_left_out_of_the_mean_f1():
    pair = np.array([[0, 0, 1], [0, 1, 1]], np.float64)
    for weighted, average in ((True, "weighted"), (False, "macro")):
        (value,) = labels.f1(pair, np.ones((1, 3)), 5, weighted=weighted)
        assert value == pytest.approx(f1_score(pair[0], pair[1], average=average), abs=1e-12)


def test_label_retrieval_equals_sorting_all_images(drawn):
    field, embeddings, images = drawn
    scores = embeddings @ images.T
    right = field.members == np.arange(LABELS)[:, None]
    found = labels.retrieve(field, embeddings, images)
    assert (found["queries"], found["gallery"]) == (LABELS, IMAGES)
    ordered = np.take_along_axis(right, np.argsort(-scores, axis=1), axis=1)
    expected = {
        "precision@1": ordered[:, 0].mean(),
        "precision@10": ordered[:, :10].mean(),
        "map": np.mean([average_precision_score(r, s) for r, s in zip(right, scores, strict=True)]),
        "mrr": (1 / (1 + ordered.argmax(axis=1))).mean(),
        "ndcg@10": ndcg_score(right, scores, k=10),
    }
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-9), name
