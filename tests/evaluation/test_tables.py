"""Tables for the terminal show each figure in its row and column."""

from jaxclip.evaluation import tables

KS = (1, 3, 5, 10, 20)


def row(start, queries=None):
    figures = {f"hit@{k}": {"value": start + k / 1000} for k in KS}
    return figures | ({} if queries is None else {"queries": queries}) | {"mrr": {"value": 0.999}}


def figures(start):
    categories = {"Shoes": row(start + 0.1, 9), "Wrist Watches": row(start + 0.2, 4)}
    return {"text_to_image": row(start), "by_category": categories}


def entry(value):
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def part(start, queries, gallery, **more):
    """Returns the figures of a protocol from text to image; chance is 0.01 k."""
    figures = {f"hit@{k}": entry(start + k / 1000) for k in (1, 5)} | {"mrr": entry(0.9)}
    chance = {f"hit@{k}": k / 100 for k in (1, 5)}
    return {"text_to_image": figures, "chance": chance, "queries": queries, "gallery": gallery, **more}


def evaluation():
    """Returns the metrics of an evaluation with every protocol, and the mixture's catalogues a and b."""
    judged = {name: entry(0.7) for name in ("hit@1", "hit@5", "mrr", "ndcg@10", "judged@10")}
    counts = {"queries": 12, "without_answer": 3, "unjudged": 4, "gallery": 90}
    by_catalogue = {
        name: part(start, 45, 44, pairs=part(start / 2, 45, 44)) for name, start in (("a", 0.1), ("b", 0.3))
    }
    return part(
        0.4, 100, 90,
        image_to_text=part(0.5, 1, 1)["text_to_image"], chance_image_to_text={"hit@1": 0.02, "hit@5": 0.1},
        pairs=part(0.3, 100, 90, ceiling={"hit@1": 0.8, "hit@5": 0.95}), single=part(0.35, 60, 60, draws=10),
        image_to_image=part(0.6, 7, 90)["text_to_image"] | {"queries": 7, "gallery": 90, "chance": {}},
        judged=judged | counts, sources=by_catalogue, notes=["said with the figures"],
        mean_of_sources={"groups": {"text_to_image": {"hit@1": 0.201, "hit@5": 0.205}}},
    )  # fmt: skip


def lines_by_heading(table):
    """Returns heading -> its lines, without the explanations below an empty line."""
    found, heading = {}, ""
    for line in table.partition("\n\n")[0].splitlines()[1:]:
        heading = line if not line.startswith(" ") else heading
        found.setdefault(heading, []).append(line.split())
    return found


def test_the_table_shows_each_protocol_with_its_sizes_its_ceiling_and_chance():
    table = tables.headline(evaluation())
    assert table.splitlines()[0].split() == ["hit@1", "hit@5", "queries", "gallery"]
    found = lines_by_heading(table)
    assert list(found) == [
        "text to image",
        "image to text",
        "image to image",
        "judged queries",
        "text to image, catalogues",
    ]
    groups, chance, pairs, ceiling, single = found["text to image"][1:]
    assert groups == ["groups", "0.401", "[0.391,", "0.411]", "0.405", "[0.395,", "0.415]", "100", "90"]
    assert chance == ["chance", "0.0100", "0.0500"]
    assert pairs[:2] == ["pairs", "0.301"] and ceiling == ["highest", "possible", "0.800", "0.950"]
    assert single[:2] == ["single", "0.351"] and single[-2:] == ["60", "60"]
    assert found["image to text"][1][-2:] == ["90", "100"]  # there the products ask and the texts are ranked
    assert found["image to image"][1][:4] == ["image", "to", "image", "0.601"]
    assert found["judged queries"][1][:2] == ["judged", "0.700"]
    by_catalogue = found["text to image, catalogues"]
    assert [line[:3] for line in by_catalogue if line[0] in ("a,", "b,", "mean,")] == [
        ["a,", "groups", "0.101"], ["a,", "pairs", "0.051"], ["b,", "groups", "0.301"], ["b,", "pairs", "0.151"],
        ["mean,", "groups", "0.201"],
    ]  # fmt: skip
    explained = table.partition("\n\n")[2]
    for protocol in ("groups", "pairs", "single", "image to image", "judged"):
        assert f"\n{protocol}: " in f"\n{explained}"
    assert "nDCG@10 0.700" in explained and "3 have no answer" in explained
    assert table.endswith("said with the figures")


def test_figures_without_averaging_follow_those_of_the_moving_average():
    raw = evaluation()
    raw["pairs"] = part(0.2, 100, 90)
    table = tables.headline(evaluation() | {"parameters": "ema"}, raw)
    found = lines_by_heading(table)["text to image"]
    after_pairs = found[[line[0] for line in found].index("pairs") + 1]
    assert after_pairs[:3] == ["not", "averaged", "0.201"] and "except rows 'not averaged'" in table
    assert "not averaged" not in tables.headline(evaluation() | {"parameters": "ema"})


def test_both_stages_are_shown_in_each_protocol_that_is_re_ranked():
    shares = {name: entry(0.25) for name in ("improved", "unchanged", "worsened", "retrieved")}
    compared = {f"hit@{k}": {"difference": 0.1 * k, "p": 0.04 / k**5} for k in (1, 5)}
    stages = {"first_stage": part(0.2, 1, 1)["text_to_image"], "reranked": {"k": 20, **shares, "compared": compared}}
    pairs = part(0.3, 100, 90, ceiling={"hit@1": 0.8, "hit@5": 0.95}, **stages)
    single = {"reason": "its queries are ranked by embeddings alone, and this evaluation is re-ranked"}
    table = tables.headline(part(0.4, 100, 90, pairs=pairs, single=single, **stages))
    groups, by_pairs = ([line for line in lines_by_heading(table)["text to image"]][i : i + 3] for i in (1, 5))
    for protocol, value, lines in (("groups,", "0.401", groups), ("pairs,", "0.301", by_pairs)):
        assert lines[0][:4] == [protocol, "first", "stage", "0.201"]
        assert lines[1][:3] == [protocol, "re-ranked", value]
        assert lines[2] == ["difference", "+0.100,", "p", "0.040", "+0.500,", "p", "<", "0.001"]
    assert ["highest", "possible", "0.800", "0.950"] in lines_by_heading(table)["text to image"]
    assert "re-ranking, pairs: of 100 queries 25.0% improved" in table and f"single: {single['reason']}" in table


def test_a_comparison_says_that_it_compares_groups():
    row = {"baseline": 0.4, "value": 0.5, "difference": 0.1, "low": 0.05, "high": 0.15, "p": 0.0001}
    by_direction = {"text_to_image": {"hit@1": row}, "image_to_text": {"hit@1": row}}
    table = tables.compared({**by_direction, "queries": 1200, "gallery": 90, "notes": ["10 were left out"]})
    assert table.splitlines()[0].split()[:4] == ["text", "to", "image,", "groups"]
    assert table.splitlines()[1].split() == ["hit@1", "0.400", "0.500", "+0.100", "[+0.050,", "+0.150]", "<", "0.001"]
    assert "\ngroups: every product of the query's group" in table
    assert "1,200 captions and 90 products" in table and table.endswith("10 were left out")


def test_zero_shot_precedes_fine_tuned_overall_and_in_each_category():
    lines = tables.before_and_after(figures(0.2), figures(0.5)).splitlines()
    assert lines[0].split() == ["R@1", "R@3", "R@5", "R@10", "R@20"]
    assert lines[1].split() == ["zero-shot,", "groups", "0.201", "0.203", "0.205", "0.210", "0.220"]
    assert lines[2].split() == ["fine-tuned,", "groups", "0.501", "0.503", "0.505", "0.510", "0.520"]
    assert lines[5].split() == ["R@1", "R@3", "R@5", "R@10", "R@20"] * 2
    before, after = ["0.301", "0.303", "0.305", "0.310", "0.320"], ["0.601", "0.603", "0.605", "0.610", "0.620"]
    assert lines[6].split() == ["Shoes", "(9)", *before, *after]
    assert lines[7].startswith("Wrist Watches (4)") and "0.999" not in "\n".join(lines)


def test_pairs_are_shown_before_and_after_training_where_both_have_them():
    before, after = ({**figures(start), "pairs": {"text_to_image": row(start - 0.1)}} for start in (0.2, 0.5))
    lines = tables.before_and_after(before, after).splitlines()
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["zero-shot,", "groups", "0.201"], ["fine-tuned,", "groups", "0.501"],
        ["zero-shot,", "pairs", "0.101"], ["fine-tuned,", "pairs", "0.401"],
    ]  # fmt: skip
