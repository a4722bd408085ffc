"""The protocol `single` equals sorting in float64 for each of its draws, on any number of devices."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.evaluation import single
from jaxclip.ranking import kernel
from jaxclip.ranking.draws import DRAWS, single_draws

KS = (1, 3, 10)
EXAMPLES = [pytest.param(12), pytest.param(200, marks=pytest.mark.slow)]


def expected_figures(catalogue, brute_force, seed):
    """Returns the mean of each metric over the draws, direction by direction."""
    described = np.unique(catalogue.owners)
    scores, sums = catalogue.scores(), ({}, {})
    for number, draw in enumerate(single_draws(catalogue.groups[described], seed=seed)):
        random = np.random.default_rng([seed, number, 1])
        products = described[draw]
        captions = [np.flatnonzero(catalogue.owners == product) for product in products]
        drawn = random.integers([len(own) for own in captions])
        texts = [own[index] for own, index in zip(captions, drawn, strict=True)]
        shown = scores[texts][:, products]
        own = [{place} for place in range(len(products))]
        for total, matrix in zip(sums, (shown, shown.T), strict=True):
            for name, value in brute_force(matrix, own, KS).items():
                total[name] = total.get(name, 0) + value / DRAWS
    return dict(zip(("text_to_image", "image_to_text"), sums, strict=True))


def assert_equals_sorting(catalogue, brute_force, seed):
    found = single.evaluate(*catalogue.grouped, catalogue.owners, ks=KS, seed=seed)
    for direction, metrics in expected_figures(catalogue, brute_force, seed).items():
        for name, value in metrics.items():
            assert found[direction][name]["value"] == pytest.approx(value, abs=1e-12), (direction, name)
    groups = len(set(catalogue.groups[catalogue.owners]))
    assert found["queries"] == found["gallery"] == groups and found["draws"] == DRAWS == 10
    for k in KS:
        assert found["chance"][f"hit@{k}"] == pytest.approx(min(1, k / groups))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_single_equals_sorting_on_random_catalogues(examples, random_catalogue, brute_force, one_device):
    @settings(max_examples=examples, deadline=None)
    @given(st.integers(0, 2**32), st.booleans())
    def equal(seed, captioned):
        assert_equals_sorting(random_catalogue(seed, captioned=captioned), brute_force, seed % 3)

    equal()


def with_real_vectors(catalogue, random):
    """Returns the grouped texts and products of a catalogue with vectors that are not integers."""
    texts, products = catalogue.grouped
    texts.embeddings = random.normal(size=texts.embeddings.shape).astype(np.float32)
    products.embeddings = random.normal(size=products.embeddings.shape).astype(np.float32)
    return texts, products


def test_draws_are_equal_on_one_and_eight_devices_and_in_a_second_evaluation(
    random_catalogue, quick_compilation, request
):
    assert jax.device_count() == 8
    catalogue = random_catalogue(1)
    grouped = with_real_vectors(catalogue, np.random.default_rng(0))
    on_eight, again = (single.evaluate(*grouped, catalogue.owners, ks=KS) for _ in range(2))
    assert on_eight == again != single.evaluate(*grouped, catalogue.owners, ks=KS, seed=1)
    request.getfixturevalue("one_device")
    assert single.evaluate(*grouped, catalogue.owners, ks=KS) == on_eight


def test_names_of_groups_do_not_matter_if_their_order_is_the_same(random_catalogue, one_device):
    catalogue = random_catalogue(4)
    texts, products = catalogue.grouped
    numbers = single.evaluate(texts, products, catalogue.owners, ks=KS)
    names = np.array([f"group {group:03}" for group in catalogue.groups])
    texts.groups, products.groups = names[catalogue.owners], names
    assert single.evaluate(texts, products, catalogue.owners, ks=KS) == numbers


def test_all_draws_run_one_program(random_catalogue, one_device, monkeypatch):
    seen, make_visit = [], kernel.make_visit
    monkeypatch.setattr(
        kernel, "make_visit", lambda *arguments, **options: (seen.append(options), make_visit(*arguments, **options))[1]
    )
    catalogue = random_catalogue(1)
    single.evaluate(*catalogue.grouped, catalogue.owners, ks=KS)
    assert len(seen) == DRAWS and seen[0]["segments"] and all(options == seen[0] for options in seen)
