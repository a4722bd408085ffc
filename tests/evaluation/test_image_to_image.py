"""The protocol `image_to_image` equals sorting in float64, with the query's own picture left out."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.evaluation import image_to_image
from jaxclip.evaluation.protocols import GroupedEmbeddings

KS = (1, 3, 10)
EXAMPLES = [pytest.param(12), pytest.param(200, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def small_programs(one_device):
    """Ranks on one device."""


def expected_figures(catalogue, roles, brute_force):
    """Returns the mean of each metric, the chance of hit@k, and the numbers of answered and other queries."""
    vectors, owners, groups = catalogue.pictures.astype(np.float64), catalogue.picture_owners, catalogue.groups
    has_roles = set(roles) >= {"query", "gallery"}
    asking = [p for p in range(len(owners)) if not has_roles or roles[p] == "query"]
    ranked = [p for p in range(len(owners)) if not has_roles or roles[p] == "gallery"]
    lists, answers, chances = [], [], []
    for query in asking:
        scores = {}
        for picture in ranked:
            if picture != query:
                score = float(vectors[query] @ vectors[picture])
                scores[owners[picture]] = max(score, scores.get(owners[picture], -np.inf))
        products = sorted(scores)
        right = {place for place, product in enumerate(products) if groups[product] == groups[owners[query]]}
        if right:
            lists.append([scores[product] for product in products])
            answers.append(right)
            chances.append([1 - comb(len(products) - len(right), k) / comb(len(products), k) for k in KS])
    metrics = brute_force(lists, answers, KS) if lists else None
    return metrics, np.mean(chances, axis=0) if lists else None, len(lists), len(asking) - len(lists)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_image_to_image_equals_sorting_on_random_catalogues(examples, random_catalogue, brute_force):
    @settings(max_examples=examples, deadline=None)
    @given(st.integers(0, 2**32), st.booleans())
    def equal(seed, with_roles):
        catalogue = random_catalogue(seed)
        random = np.random.default_rng(seed)
        names = ["query", "gallery", "gallery", "train"] if with_roles else [""]
        roles = [str(role) for role in random.choice(names, len(catalogue.picture_owners))]
        found = image_to_image.evaluate(catalogue.grouped[1], roles, ks=KS)
        metrics, chances, answered, others = expected_figures(catalogue, roles, brute_force)
        if metrics is None:
            assert list(found) == ["reason"]
            return
        for name, value in metrics.items():
            assert found[name]["value"] == pytest.approx(value, abs=1e-12), name
        assert list(found["chance"].values()) == pytest.approx(list(chances))
        assert (found["queries"], found["without_answer"]) == (answered, others)
        assert found["split"] == ("catalogue" if with_roles else "all pictures")

    equal()


def test_only_query_pictures_ask_and_only_gallery_pictures_are_ranked():
    """As in In-shop: the picture with neither role would be the best answer of a wrong product."""
    pictures = np.array([[1, 0], [0.9, 0.1], [0, 1], [1, 0], [0.1, 0.9]], np.float32)
    products = GroupedEmbeddings(pictures, ["a", "b", "c"], np.array([0, 0, 1, 1, 2]))
    found = image_to_image.evaluate(products, ["query", "gallery", "gallery", "", "query"], ks=(1,))
    assert found["hit@1"]["value"] == 1.0
    counts = {name: found[name] for name in ("queries", "without_answer", "gallery", "pictures", "split")}
    assert counts == {"queries": 1, "without_answer": 1, "gallery": 2, "pictures": 2, "split": "catalogue"}


def test_a_catalogue_of_single_pictures_in_groups_of_one_gives_a_reason():
    products = GroupedEmbeddings(np.eye(3), ["a", "b", "c"])
    assert image_to_image.evaluate(products, [""] * 3, ks=(1,)) == {
        "reason": "no picture has another one of its product or group"
    }
