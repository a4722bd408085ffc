"""The protocol `judged` equals sorting in float64: grades, ties, unjudged products, no answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip import config
from jaxclip.errors import UserError
from jaxclip.evaluation import judged
from jaxclip.evaluation.protocols import GroupedEmbeddings

KS = (1, 3, 10)
EXAMPLES = [pytest.param(20), pytest.param(200, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def compile_quickly(quick_compilation):
    """Switches XLA's optimisations off."""


def configured(path, split="test"):
    return config.build({"steps": 1, "data": {"queries": str(path), "split": split}, "model": {"preset": "tiny"}})


def figures_of_one(scores, grades, ks):
    """Returns the metrics of a query, given the scores of all products and the grades of the judged ones."""
    # Among equal scores: first products that nobody judged, then by ascending grade.
    order = sorted(range(len(scores)), key=lambda product: (-scores[product], grades.get(product, -1)))
    place = {product: place for place, product in enumerate(order, start=1)}
    right = sorted(place[product] for product, grade in grades.items() if grade > 0)
    values = {"mrr": 1 / right[0], "map": np.mean([found / rank for found, rank in enumerate(right, start=1)])}
    for k in ks:
        gain = sum(grade / np.log2(1 + place[product]) for product, grade in grades.items() if place[product] <= k)
        best = sorted(grades.values(), reverse=True)[:k]
        found = sum(rank <= k for rank in right)
        values |= {
            f"ndcg@{k}": gain / sum(grade / np.log2(1 + rank) for rank, grade in enumerate(best, start=1)),
            f"hit@{k}": float(found > 0),
            f"recall@{k}": found / len(right),
            f"precision@{k}": found / k,
            f"judged@{k}": sum(product in grades for product in order[:k]) / k,
        }
    return values


@pytest.mark.parametrize("examples", EXAMPLES)
def test_judged_equals_sorting_on_random_files(examples, random_catalogue, tmp_path):
    @settings(max_examples=examples, deadline=None)
    @given(st.integers(0, 2**32))
    def equal(seed):
        catalogue, random = random_catalogue(seed), np.random.default_rng(seed)
        products = len(catalogue.groups)
        ids = [f"product {number}" for number in range(products)]
        lines, grades = ["query,product,grade"], {}
        for query in range(random.integers(1, 20)):
            # Products from 40 on are not in this gallery; the grades 0 to 3 often tie.
            for product in random.choice(products + 10, random.integers(1, 25), replace=False).tolist():
                grade = int(random.integers(0, 4)) * int(query % 4 != 3)
                lines.append(f"query {query},product {product},{grade}")
                if product < products:
                    grades.setdefault(query, {})[product] = grade
        path = tmp_path / "queries.csv"
        path.write_text("\n".join(lines) + "\n")
        queries = judged.find(configured(path), ids) if grades else None
        if queries is None:
            return
        assert queries.texts == [f"query {query}" for query in grades]
        vectors = random.integers(-2, 3, (len(queries.texts), 3)).astype(np.float32)
        found = judged.evaluate(queries, vectors, catalogue.grouped[1], ks=KS)
        pictures = vectors.astype(np.float64) @ catalogue.pictures.astype(np.float64).T
        scores = np.maximum.reduceat(pictures, np.searchsorted(catalogue.picture_owners, np.arange(products)), axis=1)
        answered = [
            figures_of_one(row, own, KS) for row, own in zip(scores, grades.values(), strict=True) if any(own.values())
        ]
        assert found["without_answer"] == len(grades) - len(answered)
        assert found["judgements"] + found["missing"] == len(lines) - 1
        if not answered:
            assert found["reason"] == "no query has an answer in the gallery"
            return
        assert found["queries"] == len(answered)
        for name in answered[0]:
            expected = np.mean([values[name] for values in answered])
            assert found[name]["value"] == pytest.approx(expected, abs=1e-12), name

    equal()


def test_queries_of_another_split_are_left_out_and_judgements_of_missing_products_are_counted(tmp_path):
    path = tmp_path / "queries.csv"
    path.write_text("query,product,grade,split\nred,a,2,test\nred,x,1,test\nblue,b,1,train\ngreen,y,1,test\n")
    queries = judged.find(configured(path), ["a", "b"])
    assert queries.texts == ["red"] and (queries.unjudged, queries.missing) == (1, 2)
    found = judged.evaluate(queries, np.eye(2)[:1], GroupedEmbeddings(np.eye(2), [0, 1]), ks=(1,))
    assert found["ndcg@1"]["value"] == 1.0 and found["missing"] == 2 and found["unjudged"] == 1
    assert judged.find(configured(path, "all"), ["a", "b"]).texts == ["red", "blue"]


def test_a_file_with_other_ids_is_refused_by_examples_of_both(tmp_path):
    path = tmp_path / "queries.csv"
    path.write_text("query,product,grade\nred,sku-1,1\n")
    with pytest.raises(UserError, match=r"queries\.csv judges none of the 2 products .*like 1, 2; it names sku-1"):
        judged.find(configured(path), ["1", "2"])
    assert judged.find(config.build({"steps": 1, "model": {"preset": "tiny"}}), ["1"]) is None
