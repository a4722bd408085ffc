"""Tables for the terminal show each figure in its row and column."""

from jaxclip.evaluation import tables

KS = (1, 3, 5, 10, 20)


def row(start, queries=None):
    figures = {f"hit@{k}": {"value": start + k / 1000} for k in KS}
    return figures | ({} if queries is None else {"queries": queries}) | {"mrr": {"value": 0.999}}


def figures(start):
    categories = {"Shoes": row(start + 0.1, 9), "Wrist Watches": row(start + 0.2, 4)}
    return {"text_to_image": row(start), "by_category": categories}


def test_zero_shot_precedes_fine_tuned_overall_and_in_each_category():
    lines = tables.before_and_after(figures(0.2), figures(0.5)).splitlines()
    assert lines[0].split() == ["R@1", "R@3", "R@5", "R@10", "R@20"]
    assert lines[1].split() == ["zero-shot", "0.201", "0.203", "0.205", "0.210", "0.220"]
    assert lines[2].split() == ["fine-tuned", "0.501", "0.503", "0.505", "0.510", "0.520"]
    assert lines[5].split() == ["R@1", "R@3", "R@5", "R@10", "R@20"] * 2
    before, after = ["0.301", "0.303", "0.305", "0.310", "0.320"], ["0.601", "0.603", "0.605", "0.610", "0.620"]
    assert lines[6].split() == ["Shoes", "(9)", *before, *after]
    assert lines[7].startswith("Wrist Watches (4)") and "0.999" not in "\n".join(lines)
