"""Test-time augmentation: averages the embeddings of several views of a picture.

Training shows crops of pictures, in which a product is larger than in the whole picture (Touvron et al. 2019, "Fixing
the train-test resolution discrepancy"). Enlarged views show it at the size that the towers were trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxclip.models.clip import normalise


@dataclass(frozen=True)
class Views:
    """The views of a picture.

    Attributes:
      zooms: factors by which the centre of the picture is enlarged; 1 shows the whole picture.
      mirror: whether each view is also shown mirrored.
    """

    zooms: tuple[float, ...] = (1.0,)
    mirror: bool = False

    def __len__(self) -> int:
        return len(self.zooms) * (1 + self.mirror)

    def render(self, pixels: UInt8[Array, "B S S 3"]) -> UInt8[Array, "V B S S 3"]:
        """Returns the V views of each picture: one per zoom and, if `mirror` is set, also the mirror image of each."""
        views = jnp.stack([_enlarge(pixels, zoom) for zoom in self.zooms])
        return jnp.concatenate([views, views[..., ::-1, :]]) if self.mirror else views

    def embed(self, encode: Callable[[Array], Array], pixels: UInt8[Array, "B S S 3"]) -> Float[Array, "B D"]:
        """Returns the normalised mean of the embeddings of all views.

        `encode` maps (B, S, S, 3) pixels to (B, D) unit vectors; it is applied to one view at a time.
        """
        views = self.render(pixels)
        return encode(views[0]) if len(self) == 1 else normalise(jax.lax.map(encode, views).mean(axis=0))


def _enlarge(pixels: UInt8[Array, "B S S 3"], zoom: float) -> UInt8[Array, "B S S 3"]:
    if zoom == 1:
        return pixels
    size = pixels.shape[1]
    scale, shift = jnp.full(2, zoom), jnp.full(2, size * (1 - zoom) / 2)
    floats = pixels.astype(jnp.float32)
    enlarged = jax.image.scale_and_translate(floats, pixels.shape, (1, 2), scale, shift, method="cubic")
    return jnp.clip(jnp.round(enlarged), 0, 255).astype(jnp.uint8)
