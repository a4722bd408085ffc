"""Encoders of pictures alone and of texts alone, whose features tell how alike two products are.

The picture's is ViT (Dosovitskiy et al. 2021), which is `clip.ImageTower` without CLIP's first norm and projection; the
text's is BERT (Devlin et al. 2019). `models.weights.encoders` reads their published weights.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxclip.models.clip import ImageConfig
from jaxclip.models.transformer import Transformer, TransformerConfig, normal


@dataclass(frozen=True)
class BERTConfig:
    """BERT's size; `types` is the number of its segment embeddings, of which captions use the first."""

    vocab_size: int
    context_length: int
    transformer: TransformerConfig
    types: int = 2


class BERT(nnx.Module):
    """BERT up to its last layer's tokens."""

    def __init__(self, config: BERTConfig, *, rngs: nnx.Rngs):
        blocks = config.transformer
        self.token_embedding = nnx.Embed(config.vocab_size, blocks.width, embedding_init=normal(0.02), rngs=rngs)
        self.positions = nnx.Param(normal(0.02)(rngs.params(), (config.context_length, blocks.width)))
        self.types = nnx.Param(normal(0.02)(rngs.params(), (config.types, blocks.width)))
        self.first_norm = nnx.LayerNorm(blocks.width, epsilon=blocks.epsilon, rngs=rngs)
        self.transformer = Transformer(blocks, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"], inside: Bool[Array, "B T"]) -> Float[Array, "B T W"]:
        """Returns the tokens after all layers; `inside` is False at the padding, whose own rows mean nothing."""
        x = self.token_embedding(tokens) + self.positions[: tokens.shape[1]] + self.types[0]
        return self.transformer(self.first_norm(x), mask=inside)

    def features(self, tokens: Int[Array, "B T"], inside: Bool[Array, "B T"]) -> Float[Array, "B W"]:
        """Returns the captions' vectors, those of the [CLS] token, which comes first; not normalised."""
        return self(tokens, inside)[:, 0].astype(jnp.float32)


def vit_config(size: int, patch: int, transformer: TransformerConfig, **normalisation) -> ImageConfig:
    """Returns the configuration with which `clip.ImageTower` is a ViT, and gives its class token after the last norm.

    `normalisation` holds mean and std of the pixels.
    """
    return ImageConfig(size, patch, transformer, stem_bias=True, first_norm=False, projection=False, **normalisation)
