"""A re-ranker that reads the tokens of a query and of a candidate's picture together."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from jaxclip.models.transformer import Transformer, TransformerConfig, normal

LAYERS, HEADS = 6, 8


@dataclass(frozen=True)
class CrossAttentionConfig:
    """The shape of a cross-attention re-ranker. Its letters are also used by the shapes in `CrossAttention`.

    Attributes:
      image_tokens: P, tokens of a picture.
      image_width: W, width of the image tower's tokens.
      text_tokens: T, tokens of a query, padding included.
      text_width: V, width of the text tower's tokens.
      logit_scale: exp(logit scale) of the first stage, which turns its cosines into logits.
      width: D, width of the transformer.
      layers: layers of the transformer; 6 in the paper (see `CrossAttention`).
      heads: attention heads of the transformer; 8 in the paper.
      dropout: share of units that training sets to zero after attention and MLP.
    """

    image_tokens: int
    image_width: int
    text_tokens: int
    text_width: int
    logit_scale: float
    width: int = 128
    layers: int = LAYERS
    heads: int = HEADS
    dropout: float = 0.1


class CrossAttention(nnx.Module):
    """Scores (query, candidate) pairs with a transformer over the token sequences of both towers.

    The network follows the paper "Fashion Image Recommendation Model for Natural Language Search Queries": tokens are
    L2-normalised and projected to one width, a CLS token (initially zero) is placed before each modality, and the
    sequences are concatenated and get positional encodings. A transformer follows, by default of 6 layers and 8 heads,
    and a feed-forward head reads its two CLS tokens. Unlike in the paper, a picture is combined with the query of the
    search and never with its own caption, and the head's output, divided by `CrossAttentionConfig.logit_scale`, is
    added to the first-stage score; before training the output is 0 for any input.
    """

    def __init__(self, config: CrossAttentionConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.image = nnx.Linear(config.image_width, width, rngs=rngs)
        self.text = nnx.Linear(config.text_width, width, rngs=rngs)
        self.image_class = nnx.Param(jnp.zeros(width))
        self.text_class = nnx.Param(jnp.zeros(width))
        length = 2 + config.image_tokens + config.text_tokens
        self.positions = nnx.Param(normal(0.02)(rngs.params(), (length, width)))
        self.transformer = Transformer(
            TransformerConfig(width, config.layers, config.heads, dropout=config.dropout), rngs=rngs
        )
        self.norm = nnx.LayerNorm(2 * width, rngs=rngs)
        self.hidden = nnx.Linear(2 * width, width, rngs=rngs)
        self.out = nnx.Linear(width, 1, use_bias=False, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(config.logit_scale)))
        self.config = config

    def fuse(
        self,
        image: Float[Array, "N P W"],
        text: Float[Array, "N T V"],
        inside: Bool[Array, "N T"],
        *,
        rng: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
        """Returns the final CLS tokens of the image and of the text of each of N pairs.

        Args:
          image: output tokens of the image tower.
          text: output tokens of the text tower.
          inside: False for the padding of the text.
          rng: random key for dropout; None disables dropout.
        """
        count, patches = image.shape[:2]
        parts = []
        for tokens, project, start in (
            (image, self.image, self.image_class),
            (text, self.text, self.text_class),
        ):
            start = jnp.broadcast_to(start[...], (count, 1, self.config.width))
            parts += [start, project(_unit(tokens) * tokens.shape[-1] ** 0.5)]
        x = jnp.concatenate(parts, axis=1) + self.positions[...]  # (N, 2 + P + T, D)
        # The text's padding, which may be between segments, moves to the end: the order of tokens has no effect.
        last = jnp.argsort(~inside, axis=1, stable=True)[..., None] + patches + 2  # (N, T, 1)
        x = jnp.concatenate([x[:, : patches + 2], jnp.take_along_axis(x, last, axis=1)], axis=1)
        x = self.transformer(x, lengths=patches + 2 + inside.sum(axis=1), rng=rng)
        return x[:, 0], x[:, 1 + patches]

    def __call__(
        self,
        query: Float[Array, "B T V"],
        first_scores: Float[Array, "B K"],
        features: Mapping[str, Float[Array, "B K P W"]],
        present: Mapping[str, Bool[Array, "B K"]],
        *,
        rng: Key[Array, ""] | None = None,
    ) -> Float[Array, "B K"]:
        """Returns the scores of the K candidates of each of B queries, on the scale of the first-stage scores.

        Args:
          query: output tokens of the text tower; zero vectors are padding.
          first_scores: first-stage scores of the candidates.
          features: features of the candidates; only `image_tokens` is read.
          present: not used, because every product has `image_tokens`.
          rng: random key for dropout; None disables dropout.
        """
        batch, candidates = first_scores.shape
        image = features["image_tokens"].reshape(batch * candidates, *features["image_tokens"].shape[2:])
        text = jnp.repeat(query.astype(jnp.float32), candidates, axis=0)  # (B * K, T, V)
        image_class, text_class = self.fuse(image, text, (text != 0).any(axis=-1), rng=rng)
        both = self.norm(jnp.concatenate([image_class, text_class], axis=-1))
        added = self.out(jax.nn.gelu(self.hidden(both), approximate=True)).reshape(batch, candidates)
        return first_scores + added / self.config.logit_scale

    def logits(self, scores: Float[Array, "B K"]) -> Float[Array, "B K"]:
        """Returns the logits for a loss: the scores times exp(logit scale), where the logit scale is a parameter."""
        return scores * jnp.exp(self.logit_scale[...])


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))
