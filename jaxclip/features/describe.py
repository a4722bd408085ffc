"""Computes the stored features of products: boxes, crops, geometry, colours and texture."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import UInt8
from threadpoolctl import threadpool_limits

from jaxclip.catalog import pictures
from jaxclip.catalog.describe import TEXT, Column, Description
from jaxclip.catalog.pictures import Picture
from jaxclip.catalog.product import Product, picture_name
from jaxclip.features import colour, crop, texture
from jaxclip.features.detect import Detections, Detector, make_detector
from jaxclip.features.detectors.foreground import foreground_mask

SIDE = 512
"""Longer side, in pixels, to which larger pictures are reduced before features are computed."""
FELL_BACK = "nothing detected: crop is the whole picture"


@dataclass(frozen=True)
class ProductDescriber:
    """Detects products, selects crops, and computes features of every crop; a `catalog.describe.Describer`.

    Stored values, of the pictures in their order:

    - all N detections, including parts of products: `boxes` (N, 4), `box_scores` (N,) and `box_labels`;
    - the C crops that the policy selects, of each picture best first: `crops` (C, 4) and `crop_labels`;
    - of each crop, from the product's pixels in it: `colour_rgb` (C, colours, 3), `colour_shares` (C, colours) and
      `colour_names` (C * colours names), dominant colour first; `colour_histogram` (C, `colour.histogram_size()`); and
      `texture` (C, columns `texture.NAMES`);
    - `counts` (P, 2): the numbers of boxes and of crops of each of the P pictures; (0, 2) if there is one picture, to
      which all belong.

    Boxes and crops are left, top, right, bottom as shares of the picture's width and height.

    Attributes:
      detector: spec for `features.detect.make_detector`.
      policy: crop policy for `features.crop.choose`.
      padding: margin added on each side of a crop, as a share of the width or height of the detected box.
      colours: number of colours stored per product.
    """

    detector: str = "foreground"
    policy: str = "largest"
    padding: float = 0.05
    colours: int = 3

    @property
    def columns(self) -> Mapping[str, Column]:
        return {
            "boxes": Column((None, 4), "float32"),
            "box_scores": Column((None,), "float32"),
            "box_labels": Column((None,), TEXT),
            "crops": Column((None, 4), "float32"),
            "crop_labels": Column((None,), TEXT),
            "colour_rgb": Column((None, self.colours, 3), "uint8"),
            "colour_shares": Column((None, self.colours), "float32"),
            "colour_names": Column((None,), TEXT),
            "colour_histogram": Column((None, colour.histogram_size()), "float32"),
            "texture": Column((None, len(texture.NAMES)), "float32"),
            "counts": Column((None, 2), "int64"),
        }

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def __call__(self, products: Sequence[Product], stored: Sequence[Sequence[Picture]]) -> list[Description]:
        images = [pictures.pixels(picture.encoded, SIDE) for of_product in stored for picture in of_product]
        owners = [product for product, of_product in zip(products, stored, strict=True) for _ in of_product]
        names = [picture_name(location) or product.id for product in products for location in product.pictures]
        # Workers are processes that already use all cores: more threads would only compete for them.
        with threadpool_limits(1):
            detections = _load(self.detector)(images, names)
            described = iter([self._describe(*inputs) for inputs in zip(owners, images, detections, strict=True)])
        return [_join(list(itertools.islice(described, len(of_product)))) for of_product in stored]

    def best_crop(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the best crop of a picture that belongs to no product; the whole picture if nothing is detected."""
        with threadpool_limits(1):
            (detections,) = _load(self.detector)([image], [""])
        return crop.cut(image, crop.choose(detections, self.policy, padding=self.padding)[0].box)

    def _describe(self, product: Product, image: np.ndarray, detections: Detections) -> Description:
        """Returns the description of one picture of a product."""
        crops = crop.choose(detections, self.policy, product.category, self.padding)
        full_mask = foreground_mask(image) if detections.mask is None else detections.mask
        values: dict[str, list] = {"colour_rgb": [], "colour_shares": [], "colour_histogram": [], "texture": []}
        names: list[str] = []
        for part in crops:
            pixels, mask = crop.cut(image, part.box), crop.cut(full_mask, part.box)
            tally = colour.tally(pixels, mask)
            colours = colour.colours(tally, self.colours)
            names += colours.names
            values["colour_rgb"].append(colours.rgb)
            values["colour_shares"].append(colours.shares)
            values["colour_histogram"].append(colour.colour_histogram(tally))
            values["texture"].append(texture.texture(pixels, mask))
        described = {
            "boxes": detections.boxes,
            "box_scores": detections.scores,
            "box_labels": list(detections.labels),
            "crops": np.array([part.box for part in crops], np.float32),
            "crop_labels": [part.label for part in crops],
            "colour_names": names,
            **{name: np.stack(of_crops) for name, of_crops in values.items()},
            "counts": np.array([[len(detections.boxes), len(crops)]], np.int64),
        }
        return Description(described, (FELL_BACK,) if crops[0].fell_back else ())


@lru_cache(maxsize=1)
def _load(spec: str) -> Detector:
    """Returns the detector of a spec; cached, so that its weights are loaded once per process."""
    return make_detector(spec)


def _join(of_pictures: Sequence[Description]) -> Description:
    """Returns the description of a product from those of its pictures."""
    if len(of_pictures) == 1:
        (description,) = of_pictures
        return replace(description, values=description.values | {"counts": np.zeros((0, 2), np.int64)})
    columns = {name: [one.values[name] for one in of_pictures] for name in of_pictures[0].values}
    values = {
        name: list(itertools.chain(*parts)) if isinstance(parts[0], list) else np.concatenate(parts)
        for name, parts in columns.items()
    }
    return Description(values, tuple(kind for one in of_pictures for kind in one.oddities))
