"""A search with a second stage gives the order of an evaluation and explains it, and wrong towers are refused."""

import json
import shutil

import numpy as np
import pytest

import jaxclip
from jaxclip import config as configs
from jaxclip.errors import UserError
from jaxclip.pipeline import prepared_data
from jaxclip.ranking.candidates import retrieve
from jaxclip.reranking.data import FILENAME, find_first_stage
from jaxclip.reranking.reranker import Scorer, make_reranker
from jaxclip.reranking.run import RerankEvaluator
from jaxclip.serving.searcher import Query
from jaxclip.towers.checkpoints import Checkpoints

pytestmark = pytest.mark.slow
K = 20


def ids(results):
    return [row.id for row in results]


def evaluation_scores(workdir, towers, shop):
    """Returns the captions of the gallery, and the ids and scores that an evaluation gives their candidates."""
    config = configs.load_config(workdir, {"data.path": str(shop), "data.split": "all", "first_stage": str(towers)})
    first = find_first_stage(config, workdir)
    prepared = prepared_data.prepared_dataset(config, whole=True, say=print)
    evaluator = RerankEvaluator(config, first, prepared, workdir)
    split = evaluator.split
    candidates = retrieve(split.queries, split.images, split.groups[split.owners], split.groups, K)
    model = make_reranker(config, split, mesh=first.towers.mesh, logit_scale=first.logit_scale)
    checkpoints = Checkpoints(workdir, read_only=True)
    params = checkpoints.restore_params(model.shapes, checkpoints.steps()[-1])
    scores = Scorer(model, split, candidates, batch_size=16)(params)
    product_ids = np.asarray([product.id for product in evaluator.queries.products])
    return split.captions, product_ids[candidates.items], scores


def test_a_search_gives_the_scores_and_order_of_an_evaluation(reranker, reranking_searcher, trained, shop):
    captions, candidates, scores = evaluation_scores(reranker, trained, shop)
    changed = 0
    for caption, product_ids, caption_scores in list(zip(captions, candidates, scores, strict=True))[:20]:
        rows = reranking_searcher.search(str(caption), k=K)
        assert sorted(ids(rows)) == sorted(product_ids)
        expected = dict(zip(product_ids, caption_scores, strict=True))
        np.testing.assert_allclose([row.score for row in rows], [expected[row.id] for row in rows], atol=2e-4)
        assert all(a.score >= b.score for a, b in zip(rows, rows[1:], strict=False))
        changed += ids(rows) != ids(reranking_searcher.search(str(caption), k=K, rerank=False))
    assert changed > 10, "the second stage changed the order of too few queries"


def test_a_second_stage_that_reads_tokens_gives_no_reasons(train_reranker, trained, shop, tmp_path):
    shutil.copytree(trained, tmp_path / "towers")
    searcher = jaxclip.load(tmp_path / "towers", shop, rerank=train_reranker("cross_attention"))
    first, rows = (searcher.search("blue shoes", k=K, rerank=rerank) for rerank in (False, True))
    assert sorted(ids(rows)) == sorted(ids(first)) and ids(rows) != ids(first)
    assert all(a.score >= b.score for a, b in zip(rows, rows[1:], strict=False)) and not rows[0].why
    assert ids(searcher.search("red dress", k=K)) != ids(rows)


def test_reasons_add_up_to_the_score_and_products_after_the_candidates_keep_their_places(reranking_searcher, searcher):
    rows = reranking_searcher.search("blue shoes", k=60)
    first = searcher.search("blue shoes", k=60)
    assert ids(reranking_searcher.search("blue shoes", k=60, rerank=False)) == ids(first)
    assert sorted(ids(rows[:K])) == sorted(ids(first[:K])) and ids(rows[K:]) == ids(first[K:])
    before = {row.id: (row.place, row.score) for row in first}
    for row in rows:
        place, score = before[row.id]
        assert row.before == place
        assert row.score == pytest.approx(score + sum(reason.added for reason in row.why.values()), abs=1e-5)
        assert bool(row.why) == (row.place <= K)
    assert len({reason.gate for reason in rows[0].why.values()}) > 1
    assert any(reason.added for reason in rows[0].why.values())
    assert "▲" in rows._repr_html_() and "▼" in repr(rows)


def test_a_query_has_the_same_results_in_a_batch_and_alone(reranking_searcher):
    facet = reranking_searcher.gallery.facets()[1]
    queries = [Query(f"{value} shoes", filters={facet.name: [value]}, k=9, rerank=True) for value, _ in facet.values]
    queries += [Query("shoes", like=3, k=5, rerank=True), Query(like=3, k=5, rerank=True), Query("bag", k=30)]
    together = reranking_searcher.find(queries)
    for query, in_batch in zip(queries, together, strict=True):
        (alone,) = reranking_searcher.find([query])
        np.testing.assert_array_equal(in_batch.numbers, alone.numbers)
        np.testing.assert_allclose(in_batch.scores, alone.scores, atol=1e-5)
    assert together[-2].reordered is None and together[-1].reordered is None
    lengths = {len(in_batch.numbers) for in_batch in together}
    assert len(lengths) > 2, "the filters must leave lists of different lengths"


def test_any_list_of_products_can_be_reranked(reranking_searcher):
    first = reranking_searcher.search("red dress", k=K, rerank=False)
    expected = reranking_searcher.search("red dress", k=K)
    for products in (first, list(reversed(ids(first)))):
        rows = reranking_searcher.rerank("red dress", products)
        assert ids(rows) == ids(expected) and [row.before for row in rows] == [row.before for row in expected]
        np.testing.assert_allclose([row.score for row in rows], [row.score for row in expected], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "products", "message"),
    [
        ("", ["1"], "from 1 to 20 products"),
        ("dress", [], "from 1 to 20 products"),
        ("dress", ["nowhere"], "no product 'nowhere'"),
        ("dress", "all", "from 1 to 20 products"),
    ],
)
def test_invalid_lists_to_rerank_are_refused(text, products, message, reranking_searcher, searcher):
    with pytest.raises(UserError, match=message):
        reranking_searcher.rerank(text, reranking_searcher.gallery.ids if products == "all" else products)
    with pytest.raises(UserError, match="--rerank"):
        searcher.search("dress", rerank=True)


def test_a_second_stage_for_other_towers_is_refused(trained, reranker, shop, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(reranker, other)
    facts = json.loads((other / FILENAME).read_text())
    (other / FILENAME).write_text(json.dumps({**facts, "fingerprint": "0" * 12}))
    steps = sorted(int(folder.name) for folder in (trained / "checkpoints").iterdir())
    for arguments, message in (
        ({"rerank": other}, f"--rerank={other}: .*was trained on the first stage 000000000000"),
        ({"rerank": trained}, "is not a re-ranker"),
        ({"rerank": reranker, "step": str(steps[0])}, f"re-orders the results of step {steps[-1]}; leave --step out"),
        ({"rerank": tmp_path}, "is not a workdir"),
    ):
        with pytest.raises(UserError, match=message):
            jaxclip.load(trained, shop, **arguments)
