"""The data card: one self-contained HTML file that describes a prepared catalogue."""

import base64
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import jinja2
import numpy as np
from PIL import Image

from jaxclip.catalog import card_figures
from jaxclip.catalog.describe import described_pictures
from jaxclip.catalog.product import Oddity, Product
from jaxclip.runtime import files

SAMPLES, SAMPLE_SEED, SAMPLE_PIXELS = 48, 0, 360
SHOWN_ROWS, SHOWN_GROUPS, SHOWN_VALUES, SHOWN_SIZES, SHOWN_ODDITIES, SHOWN_LETTERS = 20, 8, 5, 8, 2000, 90
SECTIONS = ("tokens", "colours", "pairs")
"""Sections that `put` can add to a card, in the order of the page; each has a template, card_NAME.html.j2."""


class EncodedPictures(Protocol):
    """The encoded pictures, JPEG or PNG, of each kept product, by the product's index."""

    def __getitem__(self, index: int) -> Sequence[bytes]: ...


def write(
    path: Path,
    facts: Mapping[str, Any],
    products: Sequence[Product],
    pictures: EncodedPictures,
    sizes: Sequence[Sequence[tuple[int, int]]],
    descriptions: Sequence[Mapping[str, Any]] | None,
    oddities: Sequence[Oddity],
) -> None:
    """Writes the data card to `path`: an HTML file that depends only on the arguments and makes no network requests.

    Args:
      path: the HTML file; its folder is created.
      facts: "source" (its settings), "products", "pictures", "groups", "splits" (name -> number of products), "dropped"
        and "mended" (kind of oddity -> count) and "fingerprint", as `builder.prepare` records them.
      products: the kept products with their groups; at least one.
      pictures: the pictures of each product; the first one is shown.
      sizes: (width, height) of each product's pictures.
      descriptions: boxes, crops and colours of each product as `features.describe` stores them; None without a
        describer.
      oddities: everything that was dropped or mended.
    """
    categories = Counter(product.category for product in products).most_common()
    attributes = _attributes(products)
    counted_sizes = Counter(itertools.chain.from_iterable(sizes)).most_common()
    html = (
        _environment()
        .get_template("card.html.j2")
        .render(
            title=Path(facts["source"]["path"]).name or facts["source"]["path"],
            facts=facts,
            dropped=sum(facts["dropped"].values()),
            mended=sum(facts["mended"].values()),
            oddities=_rarest_first(oddities)[:SHOWN_ODDITIES],
            all_oddities=len(oddities),
            samples=_samples(products, pictures, sizes, descriptions),
            seed=SAMPLE_SEED,
            categories=categories[:SHOWN_ROWS],
            more_categories=categories[SHOWN_ROWS:],
            attributes=attributes[:SHOWN_ROWS],
            more_attributes=attributes[SHOWN_ROWS:],
            groups=_groups(products),
            captions=card_figures.histogram([len(text.split()) for product in products for text in product.captions]),
            sizes=counted_sizes[:SHOWN_SIZES],
            more_sizes=max(0, len(counted_sizes) - SHOWN_SIZES),
            sections=SECTIONS,
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, html)


def put(path: Path, section: str, values: Mapping[str, Any]) -> None:
    """Writes one of SECTIONS into a card, replacing what the section contained before.

    Args:
      path: a card that `write` wrote.
      section: "tokens", "colours" or "pairs".
      values: the variables of the section's template.
    """
    start, end = (f"<!--{word} {section}-->" for word in ("begin", "end"))
    html = path.read_text(encoding="utf-8")
    before, after = html[: html.index(start) + len(start)], html[html.index(end) :]
    content = _environment().get_template(f"card_{section}.html.j2").render(values)
    with files.atomically(path) as temporary:
        _write(temporary, f"{before}\n{content}\n{after}")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"count": "{:,}".format, "share": _share, "short": _short}
    return environment


def _write(path: Path, html: str) -> None:
    # A file name may be invalid Unicode; bytes that cannot be encoded appear as \udcXX.
    path.write_text(html, encoding="utf-8", errors="backslashreplace")


def _share(part: int, whole: int) -> str:
    """Returns `part` as a percentage of `whole`; 100% and 0% are shown only if they are exact."""
    if part in (0, whole):
        return "100%" if part else "0%"
    tenths = min(999, round(1000 * part / whole))
    return f"{tenths / 10:.1f}%" if tenths else "<0.1%"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_LETTERS else text[: SHOWN_LETTERS - 1].rstrip() + "…"


def _rarest_first(oddities: Sequence[Oddity]) -> list[Oddity]:
    """Returns dropped oddities before mended ones and, among each, rare kinds before frequent ones.

    A list that is cut off therefore loses the most frequent kinds of mended oddities first.
    """
    counts = Counter((oddity.dropped, oddity.kind) for oddity in oddities)
    return sorted(oddities, key=lambda o: (not o.dropped, counts[o.dropped, o.kind], o.kind))


@dataclass(frozen=True)
class _Sample:
    """A product on the card; sizes and boxes (x, y, width, height) are in pixels of the stored picture."""

    product: Product
    picture: str  # a data URI of the picture, which may be scaled down
    width: int
    height: int
    boxes: list[tuple[float, ...]]
    crops: list[tuple[float, ...]]
    swatches: list[tuple[str, float, str]]  # CSS colour, share, name


def _samples(
    products: Sequence[Product],
    pictures: EncodedPictures,
    sizes: Sequence[Sequence[tuple[int, int]]],
    descriptions: Sequence[Mapping[str, Any]] | None,
) -> list[_Sample]:
    random = np.random.default_rng(SAMPLE_SEED)
    samples = []
    for row in map(int, random.choice(len(products), min(SAMPLES, len(products)), replace=False)):
        boxes, crops, swatches = [], [], []
        if descriptions is not None:
            description = descriptions[row]
            main = described_pictures(description)[0]
            boxes = _in_pixels(main.boxes, sizes[row][0])
            crops = _in_pixels(np.stack([crop.box for crop in main.crops]), sizes[row][0])
            swatches = [(f"#{bytes(rgb).hex()}", share, name) for name, rgb, share in main.crops[0].colours if share]
        samples.append(_Sample(products[row], data_uri(pictures[row][0]), *sizes[row][0], boxes, crops, swatches))
    return samples


def _in_pixels(boxes: np.ndarray, size: tuple[int, int]) -> list[tuple[float, ...]]:
    """Returns boxes (left, top, right, bottom as shares of the picture) as (x, y, width, height) in pixels."""
    corners = np.asarray(boxes, np.float64).reshape(-1, 4) * (*size, *size)
    return [tuple(np.round((l, t, r - l, b - t), 1).tolist()) for l, t, r, b in corners]  # noqa: E741


def data_uri(encoded: bytes) -> str:
    """Returns the picture as a data URI, scaled down if a side exceeds SAMPLE_PIXELS."""
    with Image.open(BytesIO(encoded), formats=("JPEG", "PNG")) as image:
        mime = Image.MIME[image.format]
        if max(image.size) > SAMPLE_PIXELS:
            image = image.convert("RGB")
            image.thumbnail((SAMPLE_PIXELS, SAMPLE_PIXELS))
            smaller = BytesIO()
            image.save(smaller, "JPEG", quality=85)
            encoded, mime = smaller.getvalue(), "image/jpeg"
    return f"data:{mime};base64,{base64.b64encode(encoded).decode()}"


def _attributes(products: Sequence[Product]) -> list[dict[str, Any]]:
    """Returns {"name", "filled", "distinct", "values": [(value, count), ...]} per attribute, by decreasing "filled".

    "filled" is the number of products that have the attribute, "distinct" the number of its different values. "values"
    are up to SHOWN_VALUES of these, the most frequent ones, or none if no two products have the same value.
    """
    values: dict[str, Counter[str]] = {}
    for product in products:
        for name, value in product.attributes.items():
            values.setdefault(name, Counter())[value] += 1
    rows = [
        {
            "name": name,
            "filled": counts.total(),
            "distinct": len(counts),
            "values": counts.most_common(SHOWN_VALUES) if len(counts) < counts.total() else [],
        }
        for name, counts in values.items()
    ]
    return sorted(rows, key=lambda row: -row["filled"])


def _groups(products: Sequence[Product]) -> dict[str, Any]:
    """Returns {"alone": number of groups of one product, "largest": [(title, size, group id), ...]}.

    "largest" holds the SHOWN_GROUPS largest groups of more than one product, with the title of their first product.
    """
    sizes = Counter(product.group for product in products)
    names: dict[str, str] = {}
    for product in products:
        names.setdefault(product.group, product.title)
    return {
        "alone": sum(size == 1 for size in sizes.values()),
        "largest": [(names[group], size, group) for group, size in sizes.most_common(SHOWN_GROUPS) if size > 1],
    }
