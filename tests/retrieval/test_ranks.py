"""Ranks by counting equal ranks by sorting, whatever ties, duplicates and NaNs there are."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxclip.errors import UserError
from jaxclip.retrieval.ranks import Relevance, _rank_block, ranks


def brute_force(queries, gallery, relevance):
    """Ranks by one float64 sort per query: NaN last, then relevant after non-relevant, then by index."""
    with np.errstate(invalid="ignore"):
        scores = queries.astype(np.float64) @ gallery.astype(np.float64).T
    result = []
    for row, (start, end) in enumerate(zip(relevance.indptr[:-1], relevance.indptr[1:], strict=True)):
        right = relevance.indices[start:end]
        is_right = np.isin(np.arange(len(gallery)), right)
        order = sorted(
            range(len(gallery)),
            key=lambda item: (np.isnan(scores[row, item]), -np.nan_to_num(scores[row, item]), is_right[item], item),
        )
        result += [order.index(item) + 1 for item in right]
    return np.array(result), scores


@st.composite
def cases(draw):
    size, queries = draw(st.sampled_from([1, 3, 8, 9, 13])), draw(st.integers(1, 11))
    elements = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0] + ([np.nan] if draw(st.booleans()) else []))
    gallery_groups = draw(hnp.arrays(np.int64, size, elements=st.integers(0, draw(st.integers(0, 5)))))
    query_groups = draw(hnp.arrays(np.int64, queries, elements=st.sampled_from(sorted(set(gallery_groups.tolist())))))
    return (
        draw(hnp.arrays(np.float32, (queries, 2), elements=elements)),
        draw(hnp.arrays(np.float32, (size, 2), elements=elements)),
        Relevance.from_groups(query_groups, gallery_groups),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_ranks_equal_a_sort_in_float64(case):
    queries, gallery, relevance = case
    expected, scores = brute_force(queries, gallery, relevance)
    result = ranks(queries, gallery, relevance, top_k=3, tile=8)
    np.testing.assert_array_equal(result.ranks, expected)
    assert result.nan_count == np.isnan(scores).sum()
    top = np.lexsort((np.broadcast_to(np.arange(len(gallery)), scores.shape), -np.nan_to_num(scores), np.isnan(scores)))
    np.testing.assert_array_equal(result.top_items, top[:, :3])
    np.testing.assert_array_equal(result.top_scores, np.take_along_axis(scores, top[:, :3], axis=1))


def test_the_answer_among_equals_comes_last_and_several_answers_by_index():
    queries, gallery = np.ones((2, 4)), np.ones((6, 4))
    result = ranks(queries, gallery, Relevance.from_groups(["a", "b"], ["a", "b", "c", "b", "c", "b"]), tile=8)
    assert result.ranks.tolist() == [6, 4, 5, 6]


def test_equal_embeddings_score_equal_to_the_last_bit_wherever_they_stand():
    random = np.random.default_rng(0)
    gallery = np.repeat(random.normal(size=(1, 257)), 1500, axis=0)
    queries = random.normal(size=(1500, 257))
    result = ranks(queries, gallery, Relevance.from_groups(np.arange(1500), np.arange(1500)), tile=256)
    assert (result.ranks == 1500).all()


def test_infinite_scores_keep_their_place_before_nan():
    gallery = np.array([[np.nan], [-np.inf], [0.0], [np.inf]])
    result = ranks(np.ones((4, 1)), gallery, Relevance.from_groups(range(4), range(4)), top_k=4, tile=8)
    assert result.ranks.tolist() == [4, 3, 2, 1]
    assert result.top_items[0].tolist() == [3, 2, 1, 0]
    np.testing.assert_array_equal(result.top_scores[0], [np.inf, 0, -np.inf, np.nan])
    assert result.nan_count == 4


@pytest.mark.parametrize("relevant_per_query", [1, 7, 60])
def test_ranks_do_not_depend_on_the_tile(relevant_per_query):
    random = np.random.default_rng(1)
    queries, gallery = random.integers(-3, 4, (83, 3)), random.integers(-3, 4, (120, 3))
    groups = np.arange(120) % (120 // relevant_per_query)
    relevance = Relevance.from_groups(random.choice(groups, 83), groups)
    expected, _ = brute_force(queries, gallery, relevance)
    for tile in (16, 64, 256):
        result = ranks(queries, gallery, relevance, top_k=5, tile=tile)
        np.testing.assert_array_equal(result.ranks, expected)


def test_few_compilations_serve_any_number_of_queries_and_items():
    before = _rank_block._cache_size()
    random = np.random.default_rng(2)
    for size in range(1, 200, 9):
        embeddings = random.normal(size=(size, 5))
        ranks(embeddings, embeddings, Relevance.from_groups(np.arange(size), np.arange(size)), tile=8)
    assert _rank_block._cache_size() - before <= 10  # galleries of 1 to 25 tiles: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32


def test_groups_become_ascending_items_and_a_query_without_an_answer_is_named():
    relevance = Relevance.from_groups(["b", "a", "b"], ["a", "b", "a", "b"])
    assert relevance.indptr.tolist() == [0, 2, 4, 6]
    assert relevance.indices.tolist() == [1, 3, 0, 2, 1, 3]
    with pytest.raises(UserError, match=r"2 of 3 queries .* query 0 \(group 'x'\), query 2 \(group 'y'\)"):
        Relevance.from_groups(["x", "a", "y"], ["a", "b"])


def test_wrong_shapes_raise_with_the_shapes():
    relevance = Relevance.from_groups([0, 1], [0, 1])
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        ranks(np.ones((2, 3)), np.ones((2, 4)), relevance)
    with pytest.raises(ValueError, match="3 queries"):
        ranks(np.ones((3, 4)), np.ones((2, 4)), relevance)
    with pytest.raises(ValueError, match="at least one"):
        Relevance(np.array([0, 1, 1]), np.array([0]))


def test_ranks_need_no_tensorflow():
    code = "import sys; sys.modules['tensorflow'] = None; import jaxclip.retrieval.ranks"
    subprocess.run([sys.executable, "-c", code], check=True)
