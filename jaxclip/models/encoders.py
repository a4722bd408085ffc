"""Encoders of pictures only and of texts only; comparing their features measures how similar two products are.

The picture encoder is a ViT (Dosovitskiy et al. 2021): `clip.ImageTower` without CLIP's first norm and projection. The
text encoder is BERT (Devlin et al. 2019). `models.weights.encoders` loads their published weights.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxclip.models.clip import ImageConfig
from jaxclip.models.transformer import Transformer, TransformerConfig, normal


@dataclass(frozen=True)
class BERTConfig:
    """The size of BERT.

    Attributes:
      vocab_size: number of token ids.
      context_length: largest number of tokens per caption.
      transformer: configuration of the blocks.
      types: number of segment embeddings; captions use the first.
    """

    vocab_size: int
    context_length: int
    transformer: TransformerConfig
    types: int = 2


class BERT(nnx.Module):
    """BERT without a head: returns the tokens after the last layer."""

    def __init__(self, config: BERTConfig, *, rngs: nnx.Rngs):
        blocks = config.transformer
        self.token_embedding = nnx.Embed(config.vocab_size, blocks.width, embedding_init=normal(0.02), rngs=rngs)
        self.positions = nnx.Param(normal(0.02)(rngs.params(), (config.context_length, blocks.width)))
        self.types = nnx.Param(normal(0.02)(rngs.params(), (config.types, blocks.width)))
        self.first_norm = nnx.LayerNorm(blocks.width, epsilon=blocks.epsilon, rngs=rngs)
        self.transformer = Transformer(blocks, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"], inside: Bool[Array, "B T"]) -> Float[Array, "B T W"]:
        """Returns the tokens after all layers; `inside` must be False at padding, where the output has no meaning."""
        x = self.token_embedding(tokens) + self.positions[: tokens.shape[1]] + self.types[0]
        return self.transformer(self.first_norm(x), lengths=inside.sum(axis=1))

    def features(self, tokens: Int[Array, "B T"], inside: Bool[Array, "B T"]) -> Float[Array, "B W"]:
        """Returns one float32 vector per caption, not normalised: its first token, [CLS], after all layers."""
        return self(tokens, inside)[:, 0].astype(jnp.float32)


def vit_config(size: int, patch: int, transformer: TransformerConfig, **normalisation) -> ImageConfig:
    """Returns the configuration of a ViT, with which `clip.ImageTower` returns the class token after the last norm.

    `normalisation` holds the `mean` and `std` of the pixels.
    """
    return ImageConfig(size, patch, transformer, stem_bias=True, first_norm=False, projection=False, **normalisation)
