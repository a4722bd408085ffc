"""The protocol `pairs` equals sorting in float64, and no ranking exceeds its ceiling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.evaluation import pairs
from jaxclip.evaluation.protocols import GroupedEmbeddings

KS = (1, 3, 10)
EXAMPLES = [pytest.param(12), pytest.param(200, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def small_programs(one_device):
    """Ranks on one device."""


@pytest.mark.parametrize("examples", EXAMPLES)
def test_pairs_equal_sorting_on_random_catalogues(examples, random_catalogue, brute_force):
    directions = set()

    @settings(max_examples=examples, deadline=None)
    @given(st.integers(0, 2**32), st.booleans())
    def equal(seed, captioned):
        catalogue = random_catalogue(seed, captioned=captioned)
        found = pairs.evaluate(*catalogue.grouped, catalogue.owners, catalogue.text_names, ks=KS)
        scores, owners, products = catalogue.scores(), catalogue.owners, len(catalogue.groups)
        expected = {"text_to_image": brute_force(scores, [{owner} for owner in owners], KS)}
        if captioned:
            answers = [set(np.flatnonzero(owners == product)) for product in range(products)]
            expected["image_to_text"] = brute_force(scores.T, answers, KS)
        assert {name for name in found if name in ("text_to_image", "image_to_text")} == expected.keys()
        for direction, metrics in expected.items():
            for name, value in metrics.items():
                assert found[direction][name]["value"] == pytest.approx(value, abs=1e-12), (direction, name)
        for k in KS:
            assert found["text_to_image"][f"hit@{k}"]["value"] <= found["ceiling"][f"hit@{k}"] + 1e-12
            assert found["chance"][f"hit@{k}"] == pytest.approx(k / products)
        assert (found["queries"], found["gallery"]) == (len(owners), products)
        directions.update(expected)

    equal()
    assert directions == {"text_to_image", "image_to_text"}


def test_the_best_ranking_reaches_the_ceiling_of_equal_names():
    """Three products share a name, and the fourth has two captions."""
    owners, names = np.array([0, 1, 2, 3, 3]), ["a", "a", "a", "b", "c"]
    pictures = np.eye(4, dtype=np.float32) * [4, 3, 2, 1]
    texts = np.array([[1, 1, 1, 0]] * 3 + [[0, 0, 0, 1]] * 2, np.float32)
    grouped = GroupedEmbeddings(texts, [0, 0, 0, 1, 1]), GroupedEmbeddings(pictures, [0, 0, 0, 1])
    found = pairs.evaluate(*grouped, owners, names, ks=(1, 2, 3))
    assert found["ceiling"] == {"hit@1": 3 / 5, "hit@2": 4 / 5, "hit@3": 1.0}
    for name, ceiling in found["ceiling"].items():
        assert found["text_to_image"][name]["value"] == pytest.approx(ceiling)
