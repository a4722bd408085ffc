"""CLIP (Radford et al. 2021): an image tower and a text tower that embed into one shared space of unit vectors."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from jaxclip.models.embedding import embed_tokens
from jaxclip.models.linear import Linear, add_bias
from jaxclip.models.lora import LoRAConfig, add_adapters
from jaxclip.models.recompute import LayerNorm
from jaxclip.models.stem import ConvStem, PatchStem
from jaxclip.models.transformer import (
    AttentionPool,
    Transformer,
    TransformerConfig,
    example_keys,
    normal,
    shard_batch,
    split_each,
)

MAX_LOGIT_SCALE = 100.0
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageConfig:
    """The shape of the image tower.

    Attributes:
      size: side of the square pictures (S), in pixels.
      patch: side of the square that becomes one token, in pixels; must divide the size.
      stem: "patch" is a linear map of each patch (ViT), "conv" halves the picture with 3x3 convolutions until a token
        covers a patch, "residual_conv" adds residual convolutions between the halvings.
      pooling: "class" reads a class token (CLIP), "mean" averages all tokens, "map" pools by attention (SigLIP).
      transformer: configuration of the blocks.
      patch_dropout: share of a picture's patches that are left out before the transformer in training (Li et al. 2023,
        arXiv:2212.00794).
      mean: mean of each channel, with pixels scaled to [0, 1], that is subtracted.
      std: standard deviation of each channel, with pixels scaled to [0, 1], by which the difference is divided.
      stem_bias: whether the linear map of the patches has a bias.
      first_norm: whether there is a layer norm before the first block, as in CLIP.
      projection: whether a linear map projects into the shared space; without it the output has the tokens' width.
    """

    size: int
    patch: int
    transformer: TransformerConfig
    stem: str = "patch"
    pooling: str = "class"
    patch_dropout: float = 0.0
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    stem_bias: bool = False
    first_norm: bool = True
    projection: bool = True


@dataclass(frozen=True)
class TextConfig:
    """The shape of the text tower.

    Attributes:
      vocab_size: number of token ids.
      context_length: number of tokens per caption, including padding.
      end_token: token id whose first occurrence ends a caption.
      pooling: "end" reads the end token under a causal mask (CLIP); "mean" averages the caption's tokens, which attend
        to each other in both directions; "last" reads the last position, even padding, with no mask (SigLIP).
      transformer: configuration of the blocks.
      projection_bias: whether the map into the shared space has a bias.
    """

    vocab_size: int
    context_length: int
    end_token: int
    transformer: TransformerConfig
    pooling: str = "end"
    projection_bias: bool = False


@dataclass(frozen=True)
class CLIPConfig:
    """The shape of both towers and of the logits.

    Attributes:
      image: the image tower.
      text: the text tower.
      embedding: dimension of the shared space.
      temperature: initial temperature, the inverse of the logit scale.
      logit_bias: initial value of the learned logit bias of the sigmoid loss (Zhai et al. 2023, arXiv:2303.15343);
        with a bias, the logit scale has no upper limit. None for softmax losses.
      lora: configuration of the adapters; None for a model without adapters.
    """

    image: ImageConfig
    text: TextConfig
    embedding: int
    temperature: float = 0.07
    logit_bias: float | None = None
    lora: LoRAConfig | None = None


class Embeddings(NamedTuple):
    """Unit vectors of a batch of pairs, the logit scale (1 / temperature) and the bias of the sigmoid loss, if any."""

    image: Float[Array, "B D"]
    text: Float[Array, "B D"]
    logit_scale: Float[Array, ""]
    logit_bias: Float[Array, ""] | None = None


class ImageTower(nnx.Module):
    """A vision transformer (Dosovitskiy et al. 2021), optionally with CLIP's layer norm before the first block."""

    def __init__(self, config: ImageConfig, embedding: int, *, rngs: nnx.Rngs):
        width, dtype = config.transformer.width, jnp.dtype(config.transformer.dtype)
        norm = partial(LayerNorm, width, epsilon=config.transformer.epsilon, dtype=dtype, rngs=rngs)
        if config.stem == "patch":
            self.stem = PatchStem(config.patch, width, bias=config.stem_bias, dtype=dtype, rngs=rngs)
        else:
            residual = config.stem == "residual_conv"
            self.stem = ConvStem(config.patch, width, residual=residual, dtype=dtype, rngs=rngs)
        tokens = (config.size // config.patch) ** 2 + (config.pooling == "class")
        if config.pooling == "class":
            self.class_token = nnx.Param(normal(width**-0.5)(rngs.params(), (width,)))
        self.positions = nnx.Param(normal(width**-0.5)(rngs.params(), (tokens, width)))
        if config.first_norm:
            self.first_norm = norm()
        self.transformer = Transformer(config.transformer, rngs=rngs)
        self.last_norm = norm()
        if config.pooling == "map":
            self.pool = AttentionPool(config.transformer, rngs=rngs)
        if config.projection:
            self.projection = Linear(
                width, embedding, use_bias=False, kernel_init=normal(width**-0.5), dtype=dtype, rngs=rngs
            )
        self.config = config

    def __call__(self, pixels: UInt8[Array, "B S S 3"], *, rng: Key[Array, "..."] | None = None) -> Float[Array, "B D"]:
        rngs = (None,) * 3 if rng is None else split_each(example_keys(rng, pixels.shape[0]), 3)
        x = self.tokens(pixels, patch_rng=rngs[0], block_rng=rngs[1])
        if self.config.pooling == "map":
            x = self.pool(self.last_norm(x))  # (B, W)
        else:
            x = self.last_norm(x[:, 0] if self.config.pooling == "class" else x.mean(axis=1))  # (B, W)
        return self.projection(x, rng=rngs[2]) if self.config.projection else x

    def tokens(
        self,
        pixels: UInt8[Array, "B S S 3"],
        *,
        patch_rng: Key[Array, " B"] | None = None,
        block_rng: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B T W"]:
        """Returns the output of the last block: the class token if there is one, then the patches that are not dropped.

        `patch_rng` switches patch dropout on, `block_rng` the regularisation of the blocks.
        """
        mean, std = (jnp.asarray(v, jnp.float32) * 255.0 for v in (self.config.mean, self.config.std))
        normalised = (pixels.astype(jnp.float32) - mean) / std
        x = self.stem(normalised.astype(self.config.transformer.dtype))  # (B, P, W)
        positions = self.positions[...]  # (T, W)
        x = add_bias(x, positions[-x.shape[1] :])
        if patch_rng is not None:
            x = keep_patches(x, self.config.patch_dropout, patch_rng)
        if self.config.pooling == "class":
            class_token = jnp.broadcast_to(self.class_token[...] + positions[0], (x.shape[0], 1, x.shape[-1]))
            x = jnp.concatenate([class_token.astype(x.dtype), x], axis=1)  # (B, 1 + P, W)
        x = self.first_norm(x) if self.config.first_norm else x
        return self.transformer(shard_batch(x), rng=block_rng)


class TextTower(nnx.Module):
    """A text transformer: that of CLIP, that of SigLIP, or one that averages its tokens; see `TextConfig.pooling`."""

    def __init__(self, config: TextConfig, embedding: int, *, rngs: nnx.Rngs):
        width, dtype = config.transformer.width, jnp.dtype(config.transformer.dtype)
        self.token_embedding = nnx.Embed(config.vocab_size, width, embedding_init=normal(0.02), rngs=rngs)
        self.positions = nnx.Param(normal(0.01)(rngs.params(), (config.context_length, width)))
        self.transformer = Transformer(config.transformer, rngs=rngs)
        self.last_norm = LayerNorm(width, epsilon=config.transformer.epsilon, dtype=dtype, rngs=rngs)
        self.projection = Linear(
            width,
            embedding,
            use_bias=config.projection_bias,
            kernel_init=normal(width**-0.5),
            dtype=dtype,
            rngs=rngs,
        )
        self.config = config

    def __call__(self, tokens: Int[Array, "B T"], *, rng: Key[Array, "..."] | None = None) -> Float[Array, "B D"]:
        block_rng, projection_rng = (None, None) if rng is None else split_each(example_keys(rng, tokens.shape[0]), 2)
        x, inside = self.tokens(tokens, rng=block_rng)
        length = inside.sum(axis=1, keepdims=True)  # (B, 1)
        if self.config.pooling == "end":
            pooled = self.last_norm(jnp.take_along_axis(x, length[..., None] - 1, axis=1)[:, 0])  # (B, W)
        elif self.config.pooling == "last":
            pooled = self.last_norm(x[:, -1])  # (B, W)
        else:
            pooled = jnp.where(inside[..., None], self.last_norm(x), 0).sum(axis=1) / length.astype(x.dtype)
        return self.projection(pooled, rng=projection_rng)

    def tokens(
        self, tokens: Int[Array, "B T"], *, rng: Key[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T W"], Bool[Array, "B T"]]:
        """Returns the output of the last block, and True at the caption's tokens up to and including its end token."""
        end = jnp.argmax(tokens == self.config.end_token, axis=1)  # (B,)
        inside = jnp.arange(tokens.shape[1]) <= end[:, None]  # (B, T)
        x = embed_tokens(
            self.token_embedding.embedding[...],
            tokens,
            end_token=self.config.end_token,
            reached=None if self.config.pooling == "last" else inside,
            dtype=self.config.transformer.dtype,
        )
        x = add_bias(x, self.positions[...])  # (B, T, W)
        causal, lengths = self.config.pooling == "end", end + 1 if self.config.pooling == "mean" else None
        return self.transformer(shard_batch(x), causal=causal, lengths=lengths, rng=rng), inside


class CLIP(nnx.Module):
    """Both towers, the logarithm of the learned logit scale and, if configured, the learned logit bias."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.image = ImageTower(config.image, config.embedding, rngs=rngs)
        self.text = TextTower(config.text, config.embedding, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(1.0 / config.temperature)))
        if config.logit_bias is not None:
            self.logit_bias = nnx.Param(jnp.float32(config.logit_bias))
        self.config = config
        if config.lora:
            add_adapters(self, config.lora, rngs=rngs)

    def encode_image(self, pixels: UInt8[Array, "B S S 3"], *, rng: Array | None = None) -> Float[Array, "B D"]:
        """Returns unit vectors in float32; `pixels` are uint8 RGB.

        `rng` (one key, or one per example) switches on the regularisation that the configuration sets.
        """
        return normalise(self.image(pixels, rng=rng))

    def encode_text(self, tokens: Int[Array, "B T"], *, rng: Array | None = None) -> Float[Array, "B D"]:
        """Returns unit vectors in float32; each row of `tokens` must contain the end token.

        `rng` (one key, or one per example) switches on the regularisation that the configuration sets.
        """
        return normalise(self.text(tokens, rng=rng))

    def __call__(self, pixels: Array, tokens: Array, *, rng: Array | None = None) -> Embeddings:
        image_rng, text_rng = (None, None) if rng is None else split_each(example_keys(rng, len(pixels)), 2)
        image, text = self.encode_image(pixels, rng=image_rng), self.encode_text(tokens, rng=text_rng)
        return Embeddings(image, text, self.scale(), self.bias())

    def scale(self) -> Float[Array, ""]:
        """Returns the factor by which cosines are multiplied, at most MAX_LOGIT_SCALE unless there is a logit bias."""
        scale = jnp.exp(self.logit_scale[...])
        return jnp.minimum(scale, MAX_LOGIT_SCALE) if self.config.logit_bias is None else scale

    def bias(self) -> Float[Array, ""] | None:
        """Returns the bias added to the scaled cosines; None without a logit bias."""
        return None if self.config.logit_bias is None else self.logit_bias[...]


def keep_patches(x: Float[Array, "B P W"], dropped: float, rng: Key[Array, "..."]) -> Float[Array, "B K W"]:
    """Returns a random subset of each picture's P patches, in random order: K = round(P * (1 - `dropped`)), at least 1.

    If K = P, x itself is returned.
    """
    count = max(1, round(x.shape[1] * (1.0 - dropped)))
    if count == x.shape[1]:
        return x
    draws = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:2]))(example_keys(rng, len(x)))  # (B, P)
    _, indices = jax.lax.top_k(draws, count)  # (B, K)
    return jnp.take_along_axis(x, indices[..., None], axis=1)


def normalise(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Returns the rows scaled to length one; a row shorter than 1e-6 stays shorter than one, with a finite gradient.

    The result is float32 whatever the dtype of x: bfloat16 resolves cosines near 1 only to 0.004, too coarse for
    ranking.
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))
