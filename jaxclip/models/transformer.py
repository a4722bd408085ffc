"""A transformer whose layers are stored as one stack and run in a scan or unrolled."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from jaxclip.models.attention import attend, even_tokens, is_cudnn, self_attend
from jaxclip.models.linear import PRODUCT, Linear
from jaxclip.models.recompute import LayerNorm, recompute, write_gradient_once
from jaxclip.runtime import compiler
from jaxclip.runtime.mesh import BATCH_AXES

Activation = Callable[[Array], Array]


ACTIVATIONS: dict[str, Activation] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),  # not the products of attention
    "full": jax.checkpoint_policies.nothing_saveable,
}
SAVED = ("qkv", "mixed", "attended", "hidden")
"""Values of a block that the backward pass can keep, in their order: the projection to queries, keys and values, the
result of attention, the sum after attention, and the MLP's hidden features before the activation."""
EXECUTIONS = ("auto", "scan", "unroll")


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer and how it is executed.

    Attributes:
      width: number of features of a token.
      layers: number of blocks.
      heads: attention heads; divides the width.
      mlp_ratio: hidden features of a block's MLP as a multiple of the width.
      activation: key of ACTIVATIONS.
      epsilon: added to the variance in the layer norms.
      post_norm: normalise after each residual sum (Vaswani et al. 2017, BERT) instead of before attention and MLP.
      dropout: probability that a feature is zeroed after attention and MLP in training.
      stochastic_depth: probability that an example skips the attention, and independently the MLP, of the last block in
        training; it rises linearly over the blocks from 0 at the first (Huang et al. 2016).
      dtype: dtype of the computation; parameters are float32.
      execution: "scan" compiles one layer and loops over it, "unroll" compiles all layers; "auto" unrolls on the
        back ends for which `compiler.TABLE` says so, on GPUs only if nothing is recomputed.
      remat: what the backward pass recomputes; see `remat_policy`.
      attention: implementation of `models.attention.attend`.
    """

    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4
    activation: str = "gelu"
    epsilon: float = 1e-5
    post_norm: bool = False
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: str = "float32"
    execution: str = "auto"
    remat: str = "none"
    attention: str = "auto"


def remat_policy(remat: str) -> Callable[..., bool]:
    """Returns which values of a block are kept for the backward pass.

    `remat` is a key of REMAT_POLICIES, or the names of the values to keep: some of SAVED, separated by commas.

    Raises:
      ValueError: there is no such policy.
    """
    if remat in REMAT_POLICIES:
        return REMAT_POLICIES[remat]
    names = [name.strip() for name in remat.split(",") if name.strip()]
    if not names or set(names) - set(SAVED):
        raise ValueError(f"give one of {', '.join(REMAT_POLICIES)}, or some of {', '.join(SAVED)}, separated by commas")
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    if "mixed" not in names:
        return policy
    return jax.checkpoint_policies.save_from_both_policies(policy, is_cudnn)


def shard_batch(x: Array) -> Array:
    """Returns x with its first axis sharded over the mesh's batch axes; x unchanged if the mesh has no such axes."""
    if not set(BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def example_keys(rng: Key[Array, "..."], count: int) -> Key[Array, " B"]:
    """Returns one key per example: `rng` itself if it is an array of keys, else `count` keys split from it.

    With its own key, an example draws the same random numbers however examples are divided into batches or
    microbatches.
    """
    return jax.random.split(rng, count) if rng.ndim == 0 else rng


def split_each(keys: Key[Array, " B"], count: int) -> Key[Array, "N B"]:
    """Returns `count` independent keys for each of B keys; N = `count`."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def dropout(
    x: Array, rate: float | Array, keys: Key[Array, " B"] | None, *, shared_axes: tuple[int, ...] = ()
) -> Array:
    """Returns x with each entry zeroed with probability `rate` and the others divided by 1 - rate; x if `keys` is None.

    Entries along `shared_axes` are zeroed together. Sharing all axes except the batch axis gives stochastic depth.
    """
    if keys is None:
        return x
    shape = [1 if axis in shared_axes else size for axis, size in enumerate(x.shape)][1:]
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, shape))(keys)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def normal(std: float) -> Callable:
    """Returns an initialiser that draws from a normal distribution of mean 0 and standard deviation `std`."""
    return nnx.initializers.normal(stddev=std)


def activate(x: Array, name: str) -> Array:
    """Returns the activation `name` of ACTIVATIONS, computed in float32 and rounded once to the type of x.

    In bfloat16 some back ends round after each operation of the formula, which is slower and less precise.
    """
    return recompute(x, lambda x: ACTIVATIONS[name](x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype))


class Segments(tuple):
    """One parameter of all layers, split along the layer axis into arrays of trained and of frozen layers.

    It is not a pytree node, so that in a tree of parameters it is one leaf, like the unsplit array.
    """

    @property
    def bounds(self) -> tuple[int, ...]:
        """Index of the first layer of each array, then the number of layers."""
        return (0, *itertools.accumulate(len(part) for part in self))

    def between(self, first: int, last: int) -> Array:
        """Returns layers first to last - 1, which must lie in one array."""
        start, part = next((s, p) for s, p in zip(self.bounds, self, strict=False) if s <= first < s + len(p))
        return part[first - start : last - start]


class Attention(nnx.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        head = config.width // config.heads
        dtype = jnp.dtype(config.dtype)
        self.qkv = Linear(
            config.width, (3, config.heads, head), kernel_init=normal(config.width**-0.5), dtype=dtype, rngs=rngs
        )
        self.out = Linear(
            (config.heads, head),
            config.width,
            axis=(-2, -1),
            kernel_init=normal((2 * config.layers * config.width) ** -0.5),
            dtype=dtype,
            rngs=rngs,
        )
        self.implementation = config.attention

    def __call__(
        self, x: Float[Array, "B T W"], *, causal: bool, lengths: Int[Array, " B"] | None, rng: Array | None = None
    ) -> Array:
        in_rng, out_rng = (None, None) if rng is None else split_each(rng, 2)

        def project(**options) -> Array:
            return checkpoint_name(self.qkv(x, rng=in_rng, **options), "qkv")

        mixed = self_attend(project, causal=causal, lengths=lengths, implementation=self.implementation)  # (B, T, H, D)
        return self.out(checkpoint_name(mixed, "mixed"), rng=out_rng)


class Block(nnx.Module):
    """One transformer layer: x + attention(norm(x)), then x + MLP(norm(x)).

    With `post_norm` it is norm(x + attention(x)), then norm(x + MLP(x)).
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width, hidden, dtype = config.width, round(config.width * config.mlp_ratio), jnp.dtype(config.dtype)
        self.attention_norm = LayerNorm(width, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(width, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
        self.mlp_in = Linear(width, hidden, kernel_init=normal((2 * width) ** -0.5), dtype=dtype, rngs=rngs)
        self.mlp_out = Linear(
            hidden, width, kernel_init=normal((2 * config.layers * width) ** -0.5), dtype=dtype, rngs=rngs
        )
        self.activation = config.activation
        self.dropout = config.dropout
        self.stochastic_depth = config.stochastic_depth
        self.post_norm = config.post_norm

    def __call__(self, x: Array, *, causal: bool, lengths: Array | None, skip_rate: Array, rng: Array | None) -> Array:
        rngs = (None,) * 7 if rng is None else split_each(rng, 7)

        def attention_update(x: Array) -> Array:
            update = self.attention(x, causal=causal, lengths=lengths, rng=rngs[4])
            return self._regularise(update, skip_rate, rngs[0], rngs[1])

        def mlp_update(x: Array) -> Array:
            hidden = write_gradient_once(checkpoint_name(self.mlp_in(x, rng=rngs[5]), "hidden"))
            return self._regularise(
                self.mlp_out(activate(hidden, self.activation), rng=rngs[6]), skip_rate, rngs[2], rngs[3]
            )

        if self.post_norm:
            x = self.attention_norm(checkpoint_name(x + attention_update(x), "attended"))
            return self.mlp_norm(x + mlp_update(x))
        x = checkpoint_name(x + attention_update(self.attention_norm(x)), "attended")
        return x + mlp_update(self.mlp_norm(x))

    def _regularise(self, update: Array, skip_rate: Array, dropout_rng: Array | None, skip_rng: Array | None) -> Array:
        if self.dropout:
            update = dropout(update, self.dropout, dropout_rng)
        if self.stochastic_depth:
            update = dropout(update, skip_rate, skip_rng, shared_axes=(1, 2))
        return update


class AttentionPool(nnx.Module):
    """Pools tokens into one vector, as in SigLIP: a learned query attends to all tokens; a residual MLP follows.

    From Lee et al. 2019.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width, hidden, dtype = config.width, round(config.width * config.mlp_ratio), jnp.dtype(config.dtype)
        self.probe = nnx.Param(normal(width**-0.5)(rngs.params(), (width,)))
        self.attention = Attention(config, rngs=rngs)
        self.norm = LayerNorm(width, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
        self.mlp_in = Linear(width, hidden, kernel_init=normal((2 * width) ** -0.5), dtype=dtype, rngs=rngs)
        self.mlp_out = Linear(hidden, width, kernel_init=normal(hidden**-0.5), dtype=dtype, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B W"]:
        probe = jnp.broadcast_to(self.probe[...], (x.shape[0], 1, x.shape[-1])).astype(x.dtype)
        query = self.attention.qkv(probe)[:, :, 0]  # (B, 1, H, D)
        qkv = self.attention.qkv(x)  # (B, T, 3, H, D)
        mixed = attend(query, qkv[:, :, 1], qkv[:, :, 2], implementation=self.attention.implementation)  # (B, 1, H, D)
        pooled = self.attention.out(mixed)[:, 0]  # (B, W)
        return pooled + self.mlp_out(activate(self.mlp_in(self.norm(pooled)), self.activation))


class Transformer(nnx.Module):
    """A stack of blocks. Each parameter is one array (or `Segments`) for all blocks; its first axis is the layer."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = make_blocks(rngs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T W"],
        *,
        causal: bool = False,
        lengths: Int[Array, " B"] | None = None,
        rng: Key[Array, "..."] | None = None,
    ) -> Float[Array, "B T W"]:
        """Returns the tokens after all layers.

        `causal` lets each token attend only to itself and the tokens before it. `lengths` are the numbers of tokens of
        each example that are attended to; None = all. `rng` (one key, or one per example) switches on dropout and
        stochastic depth.
        """
        config, tokens = self.config, x.shape[1]
        head = config.width // config.heads
        x, lengths = even_tokens(x, head=head, causal=causal, lengths=lengths, implementation=config.attention)
        graph, stacked = nnx.split(self.blocks)
        skip_rates = jnp.linspace(0.0, config.stochastic_depth, config.layers)  # (L,)
        keys = None if rng is None else split_each(example_keys(rng, x.shape[0]), config.layers)  # (L, B)

        def run_block(x, layer):
            state, skip_rate, key = layer
            block = nnx.merge(graph, state)
            return shard_batch(block(x, causal=causal, lengths=lengths, skip_rate=skip_rate, rng=key)), None

        scanned = _uses_scan(config)
        if config.remat != "none":
            run_block = jax.checkpoint(run_block, policy=remat_policy(config.remat), prevent_cse=not scanned)
        leaves, tree = jax.tree.flatten((stacked, skip_rates, keys))
        if scanned:
            cuts = {0, config.layers}.union(*(leaf.bounds for leaf in leaves if isinstance(leaf, Segments)))
            for first, last in itertools.pairwise(sorted(cuts)):
                x, _ = jax.lax.scan(run_block, x, tree.unflatten([_slice_layers(leaf, first, last) for leaf in leaves]))
            return x[:, :tokens]
        # The gradient of jnp.unstack is one concatenation; that of indexing is a sum of as many arrays as there are
        # layers, each as large as the stack.
        unstacked = [_unstack(leaf) for leaf in leaves]
        for index in range(config.layers):
            layer = tree.unflatten([parts[index] for parts in unstacked])
            x, _ = run_block(x, layer)
        return x[:, :tokens]


def _slice_layers(leaf: Array | Segments, first: int, last: int) -> Array:
    return leaf.between(first, last) if isinstance(leaf, Segments) else leaf[first:last]


def _unstack(leaf: Array | Segments) -> list[Array]:
    parts = leaf if isinstance(leaf, Segments) else (leaf,)
    return [layer for part in parts for layer in jnp.unstack(part, axis=0)]


def _uses_scan(config: TransformerConfig) -> bool:
    if config.execution != "auto":
        return config.execution == "scan"
    # XLA's scheduler for GPUs moves the recomputation of unrolled layers far ahead of its use, so it saves no memory.
    return not compiler.has_form("unroll") or (compiler.backend() == "gpu" and config.remat != "none")
