"""A search with a second stage orders as an evaluation does, explains it, and refuses the wrong towers."""

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


def scores_of_evaluation(workdir, towers, shop):
    """Returns captions of the gallery, and the ids and scores of their candidates as an evaluation has them."""
    config = configs.load_config(workdir, {"data.path": str(shop), "data.split": "all", "first_stage": str(towers)})
    first = find_first_stage(config, workdir)
    evaluator = RerankEvaluator(config, first, prepared_data.prepared_dataset(config, whole=True, say=print), workdir)
    split = evaluator.split
    candidates = retrieve(split.queries, split.images, split.groups[split.owners], split.groups, K)
    model = make_reranker(config, split, mesh=first.towers.mesh, logit_scale=first.logit_scale)
    checkpoints = Checkpoints(workdir, read_only=True)
    params = checkpoints.restore_params(model.shapes, checkpoints.steps()[-1])
    scores = Scorer(model, split, candidates, batch_size=16)(params)
    names = np.asarray([product.id for product in evaluator.queries.products])
    return split.captions, names[candidates.items], scores


def test_a_search_orders_as_an_evaluation_does(reranker, reranking_searcher, trained, shop):
    captions, candidates, scores = scores_of_evaluation(reranker, trained, shop)
    moved = 0
    for caption, names, own in list(zip(captions, candidates, scores, strict=True))[:20]:
        rows = reranking_searcher.search(str(caption), k=K)
        assert sorted(ids(rows)) == sorted(names)
        expected = dict(zip(names, own, strict=True))
        np.testing.assert_allclose([row.score for row in rows], [expected[row.id] for row in rows], atol=2e-4)
        assert all(a.score >= b.score for a, b in zip(rows, rows[1:], strict=False))
        moved += ids(rows) != ids(reranking_searcher.search(str(caption), k=K, rerank=False))
    assert moved > 10, "the second stage does nothing"


def test_a_second_stage_that_reads_tokens_orders_without_reasons(train_reranker, trained, shop, tmp_path):
    shutil.copytree(trained, tmp_path / "towers")
    found = jaxclip.load(tmp_path / "towers", shop, rerank=train_reranker("cross_attention"))
    first, rows = (found.search("blue shoes", k=K, rerank=rerank) for rerank in (False, True))
    assert sorted(ids(rows)) == sorted(ids(first)) and ids(rows) != ids(first)
    assert all(a.score >= b.score for a, b in zip(rows, rows[1:], strict=False)) and not rows[0].why
    assert ids(found.search("red dress", k=K)) != ids(rows)


def test_reasons_add_up_and_what_it_does_not_look_at_stays(reranking_searcher, searcher):
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


def test_short_lists_and_batches_are_ordered_as_alone(reranking_searcher):
    colours = [value for value, _ in reranking_searcher.gallery.facets()[1].values]
    name = reranking_searcher.gallery.facets()[1].name
    queries = [Query(f"{value} shoes", filters={name: [value]}, k=9, rerank=True) for value in colours]
    queries += [Query("shoes", like=3, k=5, rerank=True), Query(like=3, k=5, rerank=True), Query("bag", k=30)]
    together = reranking_searcher.find(queries)
    for query, found in zip(queries, together, strict=True):
        (alone,) = reranking_searcher.find([query])
        np.testing.assert_array_equal(found.numbers, alone.numbers)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)
    assert together[-2].reordered is None and together[-1].reordered is None
    assert len({len(found.numbers) for found in together}) > 2, "filters left lists of different lengths"


def test_a_list_of_ones_own_is_reranked(reranking_searcher):
    first = reranking_searcher.search("red dress", k=K, rerank=False)
    expected = reranking_searcher.search("red dress", k=K)
    for given in (first, list(reversed(ids(first)))):
        rows = reranking_searcher.rerank("red dress", given)
        assert ids(rows) == ids(expected) and [row.before for row in rows] == [row.before for row in expected]
        np.testing.assert_allclose([row.score for row in rows], [row.score for row in expected], atol=1e-5)


@pytest.mark.parametrize("wrong", [("", ["1"]), ("dress", []), ("dress", ["nowhere"]), ("dress", "all")])
def test_what_cannot_be_reranked_is_told(wrong, reranking_searcher, searcher):
    text, products = wrong
    with pytest.raises(UserError, match="no product 'nowhere'" if products == ["nowhere"] else "from 1 to 20 products"):
        reranking_searcher.rerank(text, reranking_searcher.gallery.ids if products == "all" else products)
    with pytest.raises(UserError, match="--rerank"):
        searcher.search("dress", rerank=True)


def test_a_second_stage_of_other_towers_is_refused(trained, reranker, shop, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(reranker, other)
    facts = json.loads((other / FILENAME).read_text())
    (other / FILENAME).write_text(json.dumps({**facts, "fingerprint": "0" * 12}))
    steps = sorted(int(folder.name) for folder in (trained / "checkpoints").iterdir())
    for arguments, words in (
        ({"rerank": other}, f"--rerank={other}: .*was trained on the first stage 000000000000"),
        ({"rerank": trained}, "is not a re-ranker"),
        ({"rerank": reranker, "step": str(steps[0])}, f"re-orders the results of step {steps[-1]}; leave --step out"),
        ({"rerank": tmp_path}, "is not a workdir"),
    ):
        with pytest.raises(UserError, match=words):
            jaxclip.load(trained, shop, **arguments)
