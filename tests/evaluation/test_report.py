"""The report is one file that loads nothing from elsewhere, and captions with HTML markup are shown as text."""

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jaxclip.evaluation import report
from jaxclip.evaluation.protocols import GroupedEmbeddings, evaluate

HOSTILE = '<script>alert("x")</script> & "quotes" <img src=http://example.com/x.png>'


class Page(HTMLParser):
    """The elements of a page, as (tag, attributes), and its text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def jpeg(colour):
    file = io.BytesIO()
    Image.new("RGB", (30, 40), colour).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def metrics():
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(60, 8))
    names = [str(i) for i in range(60)]
    categories = [f"<i>category {i % 25}</i>" for i in range(60)]
    images = GroupedEmbeddings(embeddings + random.normal(size=(60, 8)), names)
    return evaluate(GroupedEmbeddings(embeddings, names), images, categories)[0]


@pytest.fixture
def query():
    items = [report.Item(jpeg("red"), "image/jpeg", HOSTILE, relevant, 0.5) for relevant in (False, True)]
    return report.QueryRow(HOSTILE, 2, items)


def write_page(tmp_path, metrics, **arguments):
    """Writes a report with these arguments and returns it parsed."""
    arguments = {"title": "A run", "run": {"workdir": "w", "command": "python -m jaxclip.evaluate"}} | arguments
    path = report.write(tmp_path / "eval" / "report.html", report.report_page(metrics, **arguments))
    return Page(path.read_text(encoding="utf-8"))


def test_the_report_loads_nothing_from_elsewhere(tmp_path, metrics, query):
    curve = [{"step": 0, "loss": 4.0}, {"step": 100, "loss": 2.0, "hit@1": 0.1}, {"step": 200, "loss": float("nan")}]
    elements = write_page(tmp_path, metrics, queries=[query], curve=curve).elements
    sources = [value for _, attributes in elements for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) == 2 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not {tag for tag, _ in elements} & {"script", "link", "iframe", "object"}
    with_url = [value for _, attributes in elements for value in attributes.values() if "://" in (value or "")]
    assert set(with_url) == {HOSTILE}


def test_markup_in_captions_and_categories_is_shown_as_text(tmp_path, metrics, query):
    page = write_page(tmp_path, metrics, title=HOSTILE, queries=[query])
    assert page.text.count(HOSTILE) == 3  # the title, the heading and the query
    assert "<i>category 3</i>" in page.text
    assert [attributes["alt"] for tag, attributes in page.elements if tag == "img"] == [HOSTILE, HOSTILE]


def test_relevant_pictures_are_marked_in_words_and_a_missed_answer_is_appended(tmp_path, metrics, query):
    text = write_page(tmp_path, metrics, queries=[query]).text
    assert text.count("✓ relevant") == 2  # in the explanation and at the picture
    missed = report.QueryRow("a shoe", 1234, query.items[:1], answer=query.items[1])
    text = write_page(tmp_path, metrics, queries=[missed]).text
    assert "first relevant picture: rank 1,234" in text and "ranked lower" in text


def test_figures_are_shown_with_their_intervals_and_chance(tmp_path, metrics):
    text = write_page(tmp_path, metrics).text
    figure = metrics["image_to_text"]["hit@5"]
    assert f"{100 * figure['value']:.1f}%" in text
    assert f"{100 * figure['low']:.1f}–{100 * figure['high']:.1f}%" in text
    assert "chance 1.7%" in text and "chance 8.3%" in text
    assert "5 smaller categories" in text and "there are 60" in text
    assert "NaN:" not in text and "Training" not in text and "Example queries" not in text


def test_each_protocol_is_named_with_its_sizes_ceiling_and_the_reason_if_it_has_no_figures(tmp_path, metrics):
    pairs = {name: metrics[name] for name in ("text_to_image", "chance", "queries", "gallery")}
    entry = {"value": 0.625, "low": 0.5, "high": 0.75}
    names = [f"{name}@{k}" for name in ("ndcg", "hit", "recall", "precision", "judged") for k in (1, 5, 10)]
    counts = {"queries": 1234, "gallery": 60, "judgements": 7654, "without_answer": 3, "unjudged": 2, "missing": 1}
    judged = {name: entry for name in [*names, "mrr", "map"]} | counts
    ceiling = {"hit@1": 0.54321, "hit@5": 0.95, "hit@10": 1.0}
    further = {"pairs": {**pairs, "ceiling": ceiling}, "single": {"reason": "no reason"}, "judged": judged}
    text = " ".join(write_page(tmp_path, metrics | further).text.split())
    assert "at most 54.3%" in text and "only the query's own product is right" in text
    assert "not evaluated: no reason" in text and "image to image" not in text
    assert "1,234 queries from data.queries, with 7,654 judgements" in text and "nDCG@k62.5%" in text
    assert "3 more queries have no answer" in text and "2 have no judged product" in text
    assert "Judged queries" not in write_page(tmp_path, metrics).text


def test_nan_scores_are_reported(tmp_path, metrics):
    assert "120 of 3,600 scores are NaN:" in write_page(tmp_path, metrics | {"nan_scores": 120}).text.replace("\n", " ")


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 0.0], [-1e-9, 5e6], [4.5, 0.1, 0.2]])
def test_every_curve_is_drawn_inside_its_frame(tmp_path, metrics, values):
    curve = [{"step": 7 * i, "loss": value} for i, value in enumerate(values)]
    elements = write_page(tmp_path, metrics, curve=curve).elements
    points = [attributes["points"].split() for tag, attributes in elements if tag == "polyline"]
    assert len(points) == 1 and len(points[0]) == len(values)
    for x, y in (map(float, point.split(",")) for point in points[0]):
        assert 56 <= x <= 416 and 14 <= y <= 206


def test_the_shown_queries_are_a_fixed_random_sample():
    sample = report.sample_queries(1500)
    assert len(set(sample.tolist())) == 24 and sample.tolist() == report.sample_queries(1500).tolist()
    assert sorted(report.sample_queries(5).tolist()) == [0, 1, 2, 3, 4]
