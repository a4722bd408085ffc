"""Computes the stored features of products: boxes, crops, geometry, colours and texture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import UInt8
from threadpoolctl import threadpool_limits

from jaxclip.catalog import pictures
from jaxclip.catalog.describe import TEXT, Column, Description
from jaxclip.catalog.pictures import Picture
from jaxclip.catalog.product import Product
from jaxclip.features import colour, crop, geometry, texture
from jaxclip.features.detect import Detections, Detector, make_detector
from jaxclip.features.detectors.foreground import foreground_mask

SIDE = 512
"""Longer side, in pixels, to which larger pictures are reduced before features are computed."""
FELL_BACK = "nothing detected: crop is the whole picture"


@dataclass(frozen=True)
class ProductDescriber:
    """Detects products, selects crops, and computes features of the first crop; a `catalog.describe.Describer`.

    Stored values:

    - all N detections, including parts of products: `boxes` (N, 4), `box_scores` (N,) and `box_labels`;
    - the crops that the policy selects, best first: `crops` (number of crops, 4), and `crop_label` of the first;
    - of the first crop: `geometry` (6,), `colour_rgb` (colours, 3), `colour_shares` (colours,) and `colour_names`,
      dominant colour first, `colour_histogram` (`colour.histogram_size()`,) and `texture`, with the columns
      `texture.NAMES`. Colours and texture are those of the product's pixels in the crop.

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
            "crop_label": Column((), TEXT),
            "geometry": Column((len(geometry.NAMES),), "float32"),
            "colour_rgb": Column((self.colours, 3), "uint8"),
            "colour_shares": Column((self.colours,), "float32"),
            "colour_names": Column((None,), TEXT),
            "colour_histogram": Column((colour.histogram_size(),), "float32"),
            "texture": Column((len(texture.NAMES),), "float32"),
        }

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def __call__(self, products: Sequence[Product], stored: Sequence[Picture]) -> list[Description]:
        images = [pictures.pixels(picture.encoded, SIDE) for picture in stored]
        # Workers are processes that already use all cores: more threads would only compete for them.
        with threadpool_limits(1):
            detections = _load(self.detector)(images, [_name(product) for product in products])
            return [self._describe(*inputs) for inputs in zip(products, images, detections, strict=True)]

    def best_crop(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the best crop of a picture that belongs to no product; the whole picture if nothing is detected."""
        with threadpool_limits(1):
            (detections,) = _load(self.detector)([image], [""])
        return crop.cut(image, crop.choose(detections, self.policy, padding=self.padding)[0].box)

    def _describe(self, product: Product, image: np.ndarray, detections: Detections) -> Description:
        crops = crop.choose(detections, self.policy, product.category, self.padding)
        box = crops[0].box
        full_mask = foreground_mask(image) if detections.mask is None else detections.mask
        pixels, mask = crop.cut(image, box), crop.cut(full_mask, box)
        tally = colour.tally(pixels, mask)
        colours = colour.colours(tally, self.colours)
        values = {
            "boxes": detections.boxes,
            "box_scores": detections.scores,
            "box_labels": list(detections.labels),
            "crops": np.array([part.box for part in crops], np.float32),
            "crop_label": crops[0].label,
            "geometry": geometry.box_geometry(np.array([box], np.float32))[0],
            "colour_rgb": colours.rgb,
            "colour_shares": colours.shares,
            "colour_names": list(colours.names),
            "colour_histogram": colour.colour_histogram(tally),
            "texture": texture.texture(pixels, mask),
        }
        return Description(values, (FELL_BACK,) if crops[0].fell_back else ())


@lru_cache(maxsize=1)
def _load(spec: str) -> Detector:
    """Returns the detector of a spec; cached, so that its weights are loaded once per process."""
    return make_detector(spec)


def _name(product: Product) -> str:
    return getattr(product.image, "name", "") or product.id
