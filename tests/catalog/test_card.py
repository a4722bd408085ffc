"""The data card is one self-contained file with correct counts and every oddity."""

import base64
import io
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxclip.catalog import card, card_figures
from jaxclip.catalog.product import Oddity, Product

HOSTILE = '<script>alert("x")</script> & "quotes" <img src=http://example.com/x.png>'


class Elements(HTMLParser):
    """The elements of a page with their attributes, its text, the rows of its tables and the figures of its tiles."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.rows, self.tiles = [], "", [], {}
        self._open, self._term = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        self.text += data
        if "tr" in self._open and ("td" in self._open or "th" in self._open):
            self.rows[-1][-1] += data
        if self._open[-1:] == ["dt"]:
            self._term = data
        if self._open[-2:] == ["dd", "b"]:
            self.tiles[self._term] = data

    def row(self, name):
        return next([cell.strip() for cell in row] for row in self.rows if row and row[0].strip() == name)


def picture(size=(30, 40), form="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, form)
    return file.getvalue()


def some_products(number):
    """Returns products: 40% are shoes, the others bags; every second has a colour; every tenth is in a shared group."""
    return [
        Product(
            id=f"id-{i}",
            pictures=(Path(f"{i}.jpg"),),
            captions=(" ".join(["word"] * (1 + i % 7)),),
            category="Shoes" if i % 10 < 4 else "Bags",
            attributes={"colour": "Red" if i % 8 else "Blue"} if i % 2 == 0 else {},
            group="tens" if i % 10 == 0 else f"id-{i}",
        )
        for i in range(number)
    ]


def write(path, products, oddities=(), pictures=None, sizes=None, descriptions=None, **facts):
    def count(dropped):
        return dict(Counter(o.kind for o in oddities if o.dropped == dropped))

    facts = {
        "source": {"reader": "table", "path": "/somewhere/shop", "test": 0.1, "split_seed": 7, "columns": {}},
        "products": len(products),
        "pictures": len(products),
        "groups": len({p.group for p in products}),
        "splits": {"train": len(products) - 1, "test": 1},
        "dropped": count(True),
        "mended": count(False),
        "fingerprint": "abcdef012345",
    } | facts
    pictures = [(one,) for one in pictures or [picture()] * len(products)]
    sizes = [(one,) for one in sizes or [(30, 40)] * len(products)]
    card.write(path, facts, products, pictures, sizes, descriptions, oddities)
    return path.read_text(encoding="utf-8")


def test_every_oddity_is_listed_and_every_kind_counted(tmp_path):
    oddities = [Oddity(f"styles.csv:{n}", "duplicate id", True) for n in range(30)]
    oddities += [Oddity(f"images/{n}.jpg", "image truncated", True) for n in range(5)]
    oddities += [Oddity(f"styles.csv:{n}", "no name, built from attributes", False) for n in range(100, 107)]
    page = Elements(write(tmp_path / "card.html", some_products(100), oddities))
    listed = [tuple(row) for row in page.rows if row[-1:] in (["dropped"], ["mended"])]
    assert sorted(listed) == sorted((o.location, o.kind, "dropped" if o.dropped else "mended") for o in oddities)
    assert page.row("duplicate id") == ["duplicate id", "30"]
    assert page.row("image truncated") == ["image truncated", "5"]
    assert page.row("no name, built from attributes") == ["no name, built from attributes", "7"]
    assert "All 42 oddities" in page.text and "100 pictures" in page.text


def test_a_truncated_list_states_its_total_and_keeps_rare_oddities(tmp_path):
    oddities = [Oddity(f"row:{n}", "no name", False) for n in range(3000)]
    oddities += [Oddity("row:7", "broken UTF-8", False), Oddity("row:8", "duplicate id", True)]
    page = Elements(write(tmp_path / "card.html", some_products(3), oddities))
    listed = [row for row in page.rows if row[-1:] in (["dropped"], ["mended"])]
    assert len(listed) == card.SHOWN_ODDITIES
    assert listed[:2] == [["row:8", "duplicate id", "dropped"], ["row:7", "broken UTF-8", "mended"]]
    assert "3,002 oddities" in page.text and "2,000 of 3,002 are listed" in page.text
    assert page.row("no name") == ["no name", "3,000"]


def test_counts_match_the_products(tmp_path):
    page = Elements(write(tmp_path / "card.html", some_products(1000), splits={"train": 900, "test": 100}))
    figures = {"products": "1,000", "groups": "901", "train": "900", "test": "100", "dropped": "0", "mended": "0"}
    assert page.tiles == figures
    assert page.row("Shoes")[1:3] == ["400", "40.0%"] and page.row("Bags")[1:3] == ["600", "60.0%"]
    colour = page.row("colour")
    assert colour[1] == "50.0%" and colour[3] == "2" and colour[4].split() == ["Red", "375", "Blue", "125"]
    assert ["word tens", "100"] in page.rows
    assert "1,000 captions of 1 to 7 words, median 4" in page.text
    assert "abcdef012345" in page.text and "10% of the products" in page.text


def test_histogram_counts_every_caption_despite_a_very_long_one():
    products = some_products(700) + [Product("long", (), ("word " * 5000,))]
    captions = card_figures.histogram([len(product.captions[0].split()) for product in products])
    assert sum(column["count"] for column in captions["columns"]) == 701
    assert [column["count"] for column in captions["columns"]][:6] == [100] * 6
    assert captions["columns"][-1]["label"] == "7+" and captions["columns"][-1]["span"] == "7 to 5000"
    assert all(column["y"] + column["height"] <= 196.1 and column["y"] >= 14 for column in captions["columns"])


def test_markup_in_names_is_text_and_nothing_is_requested(tmp_path):
    products = [Product(HOSTILE, (), (HOSTILE,), HOSTILE, {HOSTILE: HOSTILE}, HOSTILE) for _ in range(3)]
    source = {"reader": HOSTILE, "path": HOSTILE, "test": 0, "split_seed": 0, "columns": {"id": HOSTILE}}
    oddities = [Oddity(HOSTILE, HOSTILE, True), Oddity(HOSTILE, HOSTILE, False)]
    page = Elements(write(tmp_path / "card.html", products, oddities, source=source, splits={"whole": 3}))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "base", "form"} and HOSTILE in page.text
    sources = [
        value
        for _, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href", "srcset")
    ]
    assert len(sources) == 3 and all(source.startswith("data:image/") for source in sources)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    style = (tmp_path / "card.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "http" not in style and "url(" not in style and "@import" not in style


def test_samples_are_deterministic_and_have_their_own_pictures(tmp_path):
    products = some_products(60)
    sizes = [(10 + n, 20) for n in range(60)]
    pictures = [picture(size) for size in sizes]
    first = write(tmp_path / "a.html", products, pictures=pictures, sizes=sizes)
    assert first == write(tmp_path / "b.html", products, pictures=pictures, sizes=sizes)
    shown = [
        sample.product for sample in card._samples(products, [(p,) for p in pictures], [(s,) for s in sizes], None)
    ]
    assert len({product.id for product in shown}) == 48
    for product in shown:
        encoded = base64.b64encode(pictures[products.index(product)]).decode()
        item = next(part for part in first.split("<li>")[1:] if encoded in part)
        assert f"{product.id} ·" in item


@pytest.mark.parametrize(("form", "size", "mime"), [("PNG", (8, 8), "png"), ("PNG", (1600, 2000), "jpeg")])
def test_large_pictures_are_scaled_down_and_small_ones_unchanged(form, size, mime):
    encoded = picture(size, form)
    head, data = card.data_uri(encoded).split(",")
    data = base64.b64decode(data)
    assert head == f"data:image/{mime};base64" and (data == encoded) == (mime == "png")
    with Image.open(io.BytesIO(data)) as image:
        assert max(image.size) <= card.SAMPLE_PIXELS and image.width * size[1] == image.height * size[0]


def test_a_minimal_product_and_a_file_name_that_is_not_unicode_are_shown(tmp_path):
    page = write(tmp_path / "new" / "card.html", [Product("1", (), ("shirt",))], [Oddity("a\udcff.jpg", "odd", True)])
    assert "a\\udcff.jpg" in page and "without a category" in page and "The catalogue has no attributes." in page


def test_shares_are_0_or_100_percent_only_if_exact():
    assert [card._share(part, 10_000) for part in (0, 1, 4_321, 9_999, 10_000)] == [
        "0%",
        "<0.1%",
        "43.2%",
        "99.9%",
        "100%",
    ]


def test_boxes_and_crops_are_drawn_at_their_places_with_colours(tmp_path):
    described = {
        "boxes": np.array([[0.1, 0.2, 0.5, 0.7], [0, 0, 0.2, 0.1]], np.float32),
        "box_labels": ["shirt", "bag"],
        "crops": np.array([[0.05, 0.1, 0.55, 0.8]], np.float32),
        "crop_labels": ["shirt"],
        "colour_rgb": np.array([[[255, 0, 16], [0, 0, 0]]], np.uint8),
        "colour_shares": np.array([[1.0, 0.0]], np.float32),
        "counts": np.zeros((0, 2), np.int64),
        "colour_names": ["Red", "Red"],
    }
    source = {
        "reader": "table",
        "path": "/p",
        "test": 0,
        "split_seed": 0,
        "columns": {},
        "features": {"detector": "d1"},
    }
    write(tmp_path / "card.html", some_products(1), sizes=[(200, 100)], descriptions=[described], source=source)
    html = (tmp_path / "card.html").read_text()
    shapes = [f for tag, f in Elements(html).elements if tag == "rect" and f.get("class") in ("detected", "crop")]
    rectangles = [(f["class"], *(float(f[side]) for side in ("x", "y", "width", "height"))) for f in shapes]
    assert rectangles == [("detected", 20, 20, 80, 50), ("detected", 0, 0, 40, 10), ("crop", 10, 10, 100, 70)]
    assert "#ff0010" in html and html.count('<span style="background') == 1 and "d1" in html


def test_picture_sizes_are_counted(tmp_path):
    page = Elements(write(tmp_path / "card.html", some_products(5), sizes=[(60, 80)] * 3 + [(30, 40), (50, 50)]))
    assert page.row("60 x 80")[1] == "3" and page.row("50 x 50")[1] == "1"


def test_a_section_can_be_replaced_without_changing_the_rest(tmp_path):
    path = tmp_path / "card.html"
    bare = write(path, some_products(5))
    values = {"tokenizer": HOSTILE, "context": 7, "truncated": 1, "lengths": card_figures.histogram([3, 4, 9])}
    card.put(path, "tokens", values)
    once = path.read_text()
    assert HOSTILE in Elements(once).text and "1 of 3 captions" in once and len(once) > len(bare)
    card.put(path, "tokens", values)
    assert path.read_text() == once and [p.name for p in tmp_path.iterdir()] == ["card.html"]
