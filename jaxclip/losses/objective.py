"""The training objective: a loss selected by name, in its dense or its tiled implementation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxclip.losses import contrastive, tiled
from jaxclip.losses import incorrect_pairs as incorrect
from jaxclip.losses import sigmoid as pairwise
from jaxclip.losses.incorrect_pairs import Incorrect
from jaxclip.losses.labels import NO_LABELS, Labels

NAMES = ("info_nce", "sigmoid", "incorrect_pairs")
"""Values of config.loss.name; each has its case in `Objective.__call__`."""
IMPLEMENTATIONS = ("auto", "dense", "tiled")
DENSE_ROWS = 4096
"""The largest batch for which "auto" uses the dense loss, whose float32 B x B matrices take at most 64 MiB each."""


@dataclass(frozen=True)
class Objective:
    """A loss with its settings, called with the embeddings of a batch.

    Attributes:
      name: "info_nce", "sigmoid" or "incorrect_pairs".
      implementation: "dense" computes all similarities of the batch at once, "tiled" one tile at a time; "auto" is
        dense for batches of up to DENSE_ROWS pairs, else tiled. With "incorrect_pairs" it is the implementation of the
        InfoNCE loss that is added.
      tile: rows and columns of a tile of the tiled implementation; 0 = those of the back end.
      exchange: how devices exchange texts in the tiled implementation; one of `exchange.EXCHANGES`.
      products: precision of the matrix products; one of `products.PRODUCTS`.
      alpha: weight of the correct pairs' term of `incorrect_pairs`.
      beta: weight of the incorrect pairs' term of `incorrect_pairs`.
      weighting: how `incorrect_pairs` weights each pair; one of `incorrect_pairs.WEIGHTINGS`.
      info_nce: weight of the InfoNCE loss that is added to `incorrect_pairs`; 0 disables it.
    """

    name: str = "info_nce"
    implementation: str = "auto"
    tile: int = 0
    exchange: str = "gather"
    products: str = "float32"
    alpha: float = 1.0
    beta: float = 1.0
    weighting: str = "similarity"
    info_nce: float = 0.0

    def __call__(
        self,
        image: Float[Array, "B D"],
        text: Float[Array, "B D"],
        logit_scale: Float[Array, ""],
        *,
        logit_bias: Float[Array, ""] | None = None,
        labels: Labels = NO_LABELS,
        incorrect_texts: Incorrect | None = None,
        queue: contrastive.Queue | contrastive.QueueWithQueries | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the loss and the metrics to log.

        Args:
          image, text: unit vectors; row i of both is a pair.
          logit_scale: factor that turns cosines into logits.
          logit_bias: bias of the logits; required by the loss "sigmoid", ignored by others.
          labels: groups, queries and weights of the rows.
          incorrect_texts: required by the loss "incorrect_pairs", ignored by others.
          queue: additional negatives for InfoNCE, ignored by other losses; it requires `labels.group`.
        """
        match self.name:
            case "info_nce":
                return self._info_nce(image, text, logit_scale, labels, queue)
            case "sigmoid":
                return self._sigmoid(image, text, logit_scale, logit_bias, labels)
            case "incorrect_pairs":
                settings = {"alpha": self.alpha, "beta": self.beta, "weighting": self.weighting}
                value, metrics = incorrect.incorrect_pairs(
                    image, text, incorrect_texts, **settings, weight=labels.weight
                )
                if self.info_nce:
                    added, accuracy = self._info_nce(image, text, logit_scale, labels, queue)
                    value, metrics = value + self.info_nce * added, {**metrics, "info_nce": added, **accuracy}
                return jnp.asarray(value), metrics
        raise ValueError(f"loss {self.name!r} is not one of {', '.join(NAMES)}")

    def _sigmoid(self, image, text, logit_scale, logit_bias, labels):
        run = self._implementation(len(image), pairwise.sigmoid, tiled.sigmoid)
        return run(image, text, logit_scale, logit_bias, labels), {"logit_bias": logit_bias}

    def _info_nce(self, image, text, logit_scale, labels, queue):
        run = self._implementation(len(image), contrastive.info_nce, tiled.info_nce)
        return run(image, text, logit_scale, labels, queue)

    def _implementation(self, rows: int, in_one: Callable, by_tiles: Callable) -> Callable:
        if self.implementation == "tiled" or (self.implementation == "auto" and rows > DENSE_ROWS):
            return partial(by_tiles, tile=self.tile, exchange=self.exchange, products=self.products)
        return partial(in_one, products=self.products)
