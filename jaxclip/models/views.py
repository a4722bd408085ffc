"""Several views of a picture, whose embeddings are averaged (test-time augmentation).

Training shows parts of pictures, so that a product is seen larger than in the whole picture (the discrepancy of Touvron
et al. 2019, "Fixing the train-test resolution discrepancy"); enlarged views give the towers what they learned from.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxclip.models.clip import unit


@dataclass(frozen=True)
class Views:
    """The centre of a picture enlarged by each zoom (1 is the whole), and each mirrored too."""

    zooms: tuple[float, ...] = (1.0,)
    mirror: bool = False

    def __len__(self) -> int:
        return len(self.zooms) * (1 + self.mirror)

    def of(self, pixels: UInt8[Array, "B S S 3"]) -> UInt8[Array, "V B S S 3"]:
        """Returns all views of each picture."""
        views = jnp.stack([_enlarged(pixels, zoom) for zoom in self.zooms])
        return jnp.concatenate([views, views[..., ::-1, :]]) if self.mirror else views

    def embed(self, encode: Callable[[Array], Array], pixels: UInt8[Array, "B S S 3"]) -> Float[Array, "B D"]:
        """Returns the unit vector along the mean of what `encode` gives for the views, which it is shown in turn."""
        views = self.of(pixels)
        return encode(views[0]) if len(self) == 1 else unit(jax.lax.map(encode, views).mean(axis=0))


def _enlarged(pixels: UInt8[Array, "B S S 3"], zoom: float) -> UInt8[Array, "B S S 3"]:
    if zoom == 1:
        return pixels
    size = pixels.shape[1]
    scale, shift = jnp.full(2, zoom), jnp.full(2, size * (1 - zoom) / 2)
    floats = pixels.astype(jnp.float32)
    enlarged = jax.image.scale_and_translate(floats, pixels.shape, (1, 2), scale, shift, method="cubic")
    return jnp.clip(jnp.round(enlarged), 0, 255).astype(jnp.uint8)
