"""The data card: one HTML file that needs nothing beside it, by which a reader judges a prepared catalogue."""

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import jinja2
import numpy as np
from PIL import Image

from jaxclip.catalog.product import Oddity, Product

SAMPLES, SAMPLE_SEED, SAMPLE_PIXELS = 12, 0, 360
SHOWN_ROWS, SHOWN_GROUPS, SHOWN_VALUES, SHOWN_ODDITIES, SHOWN_LETTERS = 20, 8, 5, 2000, 90
MOST_BARS = 24
_LEFT, _RIGHT, _TOP, _BOTTOM, _WIDTH, _HEIGHT = 52, 8, 14, 44, 440, 240  # of the histogram, in SVG units


class EncodedPictures(Protocol):
    """Gives the JPEG or PNG bytes of the product at an index."""

    def __getitem__(self, index: int) -> bytes: ...


def write(
    path: Path,
    facts: Mapping[str, Any],
    products: Sequence[Product],
    pictures: EncodedPictures,
    oddities: Sequence[Oddity],
) -> None:
    """Writes the data card to `path`: pictures and style inside, no request to anywhere, the same bytes every time.

    Args:
      path: the HTML file; its folder is made.
      facts: "source" (its settings), "products", "groups", "splits" (name -> products), "dropped" and "mended" (kind
        of oddity -> count) and "fingerprint", as `builder.prepare` records them.
      products: what was kept, with their groups; at least one.
      pictures: the picture of each product.
      oddities: everything that was dropped or mended.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"count": "{:,}".format, "share": _share, "short": _short}
    categories = Counter(product.category for product in products).most_common()
    attributes = _attributes(products)
    html = environment.get_template("card.html.j2").render(
        title=Path(facts["source"]["path"]).name or facts["source"]["path"],
        facts=facts,
        dropped=sum(facts["dropped"].values()),
        mended=sum(facts["mended"].values()),
        oddities=_rarest_first(oddities)[:SHOWN_ODDITIES],
        all_oddities=len(oddities),
        samples=_samples(products, pictures),
        seed=SAMPLE_SEED,
        categories=categories[:SHOWN_ROWS],
        more_categories=categories[SHOWN_ROWS:],
        attributes=attributes[:SHOWN_ROWS],
        more_attributes=attributes[SHOWN_ROWS:],
        groups=_groups(products),
        captions=_captions(products),
        frame={"left": _LEFT, "right": _WIDTH - _RIGHT, "top": _TOP, "bottom": _HEIGHT - _BOTTOM}
        | {"width": _WIDTH, "height": _HEIGHT},
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file name need not be valid Unicode: what cannot be encoded is shown as \udcXX.
    path.write_text(html, encoding="utf-8", errors="backslashreplace")


def _share(part: int, whole: int) -> str:
    """Returns a percentage that is 100% or 0% only where it is exactly that."""
    if part in (0, whole):
        return "100%" if part else "0%"
    tenths = min(999, round(1000 * part / whole))
    return f"{tenths / 10:.1f}%" if tenths else "<0.1%"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_LETTERS else text[: SHOWN_LETTERS - 1].rstrip() + "…"


def _rarest_first(oddities: Sequence[Oddity]) -> list[Oddity]:
    """Returns what was dropped before what was mended, rare kinds first: a cut costs the most frequent kind alone."""
    counts = Counter((oddity.dropped, oddity.what) for oddity in oddities)
    return sorted(oddities, key=lambda o: (not o.dropped, counts[o.dropped, o.what], o.what))


def _samples(products: Sequence[Product], pictures: EncodedPictures) -> list[tuple[Product, str]]:
    random = np.random.default_rng(SAMPLE_SEED)
    rows = random.choice(len(products), min(SAMPLES, len(products)), replace=False)
    return [(products[row], _data_uri(pictures[int(row)])) for row in rows]


def _data_uri(encoded: bytes) -> str:
    """Returns the picture as an `img` element takes it, made smaller where it is larger than the page shows it."""
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
    """Returns {"name", "filled", "distinct", "values": [(value, count), ...]} of each attribute, the fullest first."""
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
    """Returns {"alone": products that share their group with none, "largest": [(a name in it, size, its id), ...]}."""
    sizes = Counter(product.group for product in products)
    names: dict[str, str] = {}
    for product in products:
        names.setdefault(product.group, product.title)
    return {
        "alone": sum(size == 1 for size in sizes.values()),
        "largest": [(names[group], size, group) for group, size in sizes.most_common(SHOWN_GROUPS) if size > 1],
    }


def _captions(products: Sequence[Product]) -> dict[str, Any] | None:
    """Returns how many captions there are, how long they are in words, and the bars and ticks of their histogram.

    None stands for a catalogue without captions.

    A few very long captions do not squeeze the others: lengths above the 99th percentile go into the last bar where
    one bar for each length would be too many.
    """
    lengths = np.array([len(caption.split()) for product in products for caption in product.captions])
    if not len(lengths):
        return None
    shortest, longest = int(lengths.min()), int(lengths.max())
    top = longest if longest - shortest < MOST_BARS else max(int(np.percentile(lengths, 99)), shortest)
    wide = math.ceil((top - shortest + 1) / MOST_BARS)
    bars = (top - shortest) // wide + 1
    counts = np.bincount(np.minimum((lengths - shortest) // wide, bars - 1), minlength=bars).tolist()
    step = _round_step(max(counts) / 4)
    highest = step * math.ceil(max(counts) / step)
    slot = (_WIDTH - _LEFT - _RIGHT) / max(bars, 8)

    def y(count):
        return round(_HEIGHT - _BOTTOM - count / highest * (_HEIGHT - _TOP - _BOTTOM), 1)

    every = math.ceil(bars / 12)
    columns = []
    for bar, count in enumerate(counts):
        first, last = shortest + bar * wide, shortest + (bar + 1) * wide - 1
        if bar == bars - 1 and last < longest:
            label, span = f"{first}+", f"{first} to {longest}"
        else:
            label, span = str(first), str(first) if wide == 1 else f"{first} to {last}"
        columns.append(
            {"x": round(_LEFT + (bar + 0.1) * slot, 1), "y": y(count), "width": round(0.8 * slot, 1)}
            | {"height": round(_HEIGHT - _BOTTOM - y(count), 1), "count": count, "span": span}
            | {"middle": round(_LEFT + (bar + 0.5) * slot, 1), "label": label if bar % every == 0 else ""}
        )
    return {
        "total": len(lengths),
        "shortest": shortest,
        "median": f"{np.median(lengths):g}",
        "longest": longest,
        "wide": wide,
        "columns": columns,
        "ticks": [(y(tick), tick) for tick in range(0, highest + 1, step)],
    }


def _round_step(rough: float) -> int:
    """Returns the smallest of 1, 2, 5, 10, 20, 50, ... that is at least `rough`."""
    power = 10 ** max(0, math.floor(math.log10(max(rough, 1))))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
