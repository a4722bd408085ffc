"""Attention for TPUs: a Pallas kernel that keeps the attention matrices in vector memory.

A step of the kernel's grid loads whole sequences of a few examples and computes their heads one group at a time; a
group is as many heads as fill the 128 lanes of a vector register. Rows of the attention matrix are complete, so the
softmax needs no running maximum, and the backward pass computes it again from queries and keys: nothing but the
arguments is stored for it. Long sequences are computed in blocks of query rows, and their heads are split over steps
of the grid.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxclip.runtime import compiler
from jaxclip.runtime.mesh import BATCH_AXES

LANES = 128  # of a vector register
TOKENS = 512  # the examples of a step of the grid have at most as many tokens in total, or it is one example
UNDIVIDED, ROWS = 640, 256  # the largest number of queries that are one block, and query rows of a block of more
BLOCK_BYTES = 6 * 2**20
"""Largest size of the arrays of a step of the grid, if heads can be split. Twice as many are in vector memory, because
the next step's arrays are loaded meanwhile."""
MEMORY = 96 * 2**20  # bytes of vector memory that the kernel may use, of 128 MiB
MASKED = -1e30  # a score whose exponential is 0


@dataclass(frozen=True)
class Heads:
    """The heads of one device.

    Attributes:
      count: heads of an example.
      size: features of a head.
      packed: whether queries, keys and values are one array; see `pack`.
    """

    count: int
    size: int
    packed: bool = False

    @property
    def group(self) -> int:
        """Heads that are computed at a time."""
        fill = LANES // math.gcd(LANES, self.size)
        return fill if self.count % fill == 0 else self.count

    @property
    def groups(self) -> int:
        return self.count // self.group

    @property
    def width(self) -> int:
        """Features of a group."""
        return self.group * self.size

    def features(self) -> list[slice]:
        """Returns the features of each head of a group."""
        return [slice(head * self.size, (head + 1) * self.size) for head in range(self.group)]


def attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    *,
    causal: bool,
    lengths: Int[Array, " B"] | None,
) -> Float[Array, "B T H D"]:
    """Returns the same as `models.attention.attend`, computed by the kernel; on CPUs in Pallas's interpret mode.

    On a mesh every device computes its examples and its heads.
    """
    flat = tuple(x.reshape(*x.shape[:2], -1) for x in (query, key, value))
    return _attention(flat, lengths, Heads(*query.shape[2:]), causal).reshape(query.shape)


def self_attention(
    qkv: Float[Array, "B T 3*W"], *, heads: int, causal: bool, lengths: Int[Array, " B"] | None
) -> Float[Array, "B T W"]:
    """Returns the attention of queries, keys and values that are packed in one array (see `pack`)."""
    return _attention((qkv,), lengths, Heads(heads, qkv.shape[2] // 3 // heads, packed=True), causal)


def pack(x: Float[Array, "*batch 3 H D"]) -> Float[Array, "*batch 3*W"]:
    """Returns queries, keys and values (the axis of size 3) as one axis: those of one group of heads after another.

    In this order the axis can be split over the devices of `tensor` as the heads are.
    """
    *batch, _, heads, size = x.shape
    group = Heads(heads // _devices("tensor", heads), size).group
    grouped = x.reshape(*batch, 3, heads // group, group, size)
    return jnp.moveaxis(grouped, -4, -3).reshape(*batch, 3 * heads * size)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attention(arrays, lengths, heads, causal):
    return _on_mesh(_forward, arrays, lengths, heads, causal)[0]


def _attention_forward(arrays, lengths, heads, causal):
    return _attention(arrays, lengths, heads, causal), (arrays, lengths)


def _attention_backward(heads, causal, residuals, gradient):
    arrays, lengths = residuals
    return tuple(_on_mesh(_backward, (*arrays, gradient), lengths, heads, causal)), None


_attention.defvjp(_attention_forward, _attention_backward)


def _devices(axes: str | Sequence[str], count: int) -> int:
    """Returns how many devices along these axes of the mesh share `count` items: 1 if they cannot be shared evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    devices = math.prod(sizes.get(axis, 1) for axis in ([axes] if isinstance(axes, str) else axes))
    return devices if count % devices == 0 else 1


def _on_mesh(run: Callable, arrays: Sequence[Array], lengths: Array | None, heads: Heads, causal: bool) -> tuple:
    """Returns what `run` (`_forward` or `_backward`) returns, on each device for its examples and its heads."""
    examples, columns = _devices(BATCH_AXES, len(arrays[0])), _devices("tensor", heads.count)
    run = partial(run, heads=replace(heads, count=heads.count // columns), causal=causal)
    if jax.sharding.get_abstract_mesh().size <= 1:
        return run(arrays, lengths)
    rows = BATCH_AXES if examples > 1 else None
    split = PartitionSpec(rows, None, "tensor" if columns > 1 else None)
    count = 1 if run.func is _forward else len(arrays) - 1
    mapped = jax.shard_map(
        run,
        in_specs=((split,) * len(arrays), None if lengths is None else PartitionSpec(rows)),
        out_specs=(split,) * count,
        check_vma=False,
    )
    return mapped(tuple(arrays), lengths)


def _forward(arrays: Sequence[Array], lengths: Array | None, *, heads: Heads, causal: bool) -> tuple[Array]:
    mixed = jax.ShapeDtypeStruct((*arrays[0].shape[:2], heads.count * heads.size), arrays[0].dtype)
    return tuple(_call(_forward_kernel, arrays, (mixed,), lengths, heads, causal))


def _backward(arrays: Sequence[Array], lengths: Array | None, *, heads: Heads, causal: bool) -> tuple[Array, ...]:
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:-1]]
    return tuple(_call(_backward_kernel, arrays, results, lengths, heads, causal))


def _call(kernel: Callable, inputs, outputs, lengths: Array | None, heads: Heads, causal: bool) -> list[Array]:
    """Returns the results of the kernel, arrays with the shapes of `outputs`."""
    batch, queries = inputs[0].shape[:2]
    keys = inputs[0 if heads.packed else 1].shape[1]
    total = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in (*inputs, *outputs))  # bytes of an example
    parts = [n for n in range(1, heads.groups + 1) if heads.groups % n == 0]
    part_count = next((n for n in parts if total <= n * BLOCK_BYTES), heads.groups)
    limit = max(1, min(TOKENS // max(queries, keys), BLOCK_BYTES // total))
    examples = next(n for n in range(limit, 0, -1) if batch % n == 0)

    def block(x) -> pl.BlockSpec:
        lanes = x.shape[2] // part_count
        return pl.BlockSpec((examples, x.shape[1], lanes), lambda example, part, *_: (example, 0, part))

    scores = batch * heads.count * queries * keys
    forward = kernel is _forward_kernel
    here = replace(heads, count=heads.count // part_count)
    return pl.pallas_call(
        partial(kernel, heads=here, causal=causal, masked=lengths is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch // examples, part_count),
            in_specs=[block(x) for x in inputs],
            out_specs=[block(x) for x in outputs],
            scratch_shapes=[] if forward else [pltpu.VMEM((keys, heads.width), jnp.float32)] * 2,
        ),
        out_shape=list(outputs),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=MEMORY),
        cost_estimate=pl.CostEstimate(
            flops=2 * (2 if forward else 5) * scores * heads.size, transcendentals=scores, bytes_accessed=batch * total
        ),
        interpret=compiler.on_cpu(),
        name="attention" if forward else "attention_backward",
    )(jnp.zeros(1, jnp.int32) if lengths is None else lengths.astype(jnp.int32), *inputs)


def _forward_kernel(lengths, *refs, heads: Heads, causal: bool, masked: bool):
    *inputs, mixed = refs

    def compute(example, group, length):
        key, value = (_read(inputs, part, example, slice(None), group, heads) for part in (1, 2))

        def rows(start, count):
            query = _read(inputs, 0, example, pl.ds(start, count), group, heads)
            found = []
            for head in heads.features():
                weights, total = _softmax(query[:, head], key[:, head], start, length, causal)
                found.append(_dot(weights.astype(value.dtype), value[:, head], 1, 0) / total)
            _write([mixed], 0, example, pl.ds(start, count), group, found, replace(heads, packed=False))

        _for_rows(mixed.shape[1], rows)

    _for_groups(compute, mixed.shape[0], lengths, heads, masked)


def _backward_kernel(lengths, *refs, heads: Heads, causal: bool, masked: bool):
    *refs, key_sum, value_sum = refs
    count = 1 if heads.packed else 3
    inputs, gradient, outputs = refs[:count], refs[count], refs[count + 1 :]

    def compute(example, group, length):
        key, value = (_read(inputs, part, example, slice(None), group, heads) for part in (1, 2))
        key_sum[...], value_sum[...] = jnp.zeros_like(key_sum), jnp.zeros_like(value_sum)

        def rows(start, count):
            here = pl.ds(start, count)
            query = _read(inputs, 0, example, here, group, heads)
            slope = _read([gradient], 0, example, here, group, replace(heads, packed=False))
            of_queries, of_keys, of_values = [], [], []
            for head in heads.features():
                weights, total = _softmax(query[:, head], key[:, head], start, length, causal)
                weights *= 1 / total
                of_weights = _dot(slope[:, head], value[:, head], 1, 1)
                of_scores = weights * (of_weights - jnp.sum(weights * of_weights, axis=1, keepdims=True))
                of_scores = (of_scores * heads.size**-0.5).astype(query.dtype)
                of_queries.append(_dot(of_scores, key[:, head], 1, 0))
                of_keys.append(_dot(of_scores, query[:, head], 0, 0))
                of_values.append(_dot(weights.astype(slope.dtype), slope[:, head], 0, 0))
            _write(outputs, 0, example, here, group, of_queries, heads)
            key_sum[...] += jnp.concatenate(of_keys, axis=1)
            value_sum[...] += jnp.concatenate(of_values, axis=1)

        _for_rows(gradient.shape[1], rows)
        _write(outputs, 1, example, slice(None), group, [key_sum[...]], heads)
        _write(outputs, 2, example, slice(None), group, [value_sum[...]], heads)

    _for_groups(compute, gradient.shape[0], lengths, heads, masked)


def _for_groups(compute: Callable, examples: int, lengths, heads: Heads, masked: bool) -> None:
    """Calls compute(example, group of heads, the example's length or None) for all groups of this step of the grid."""
    first = pl.program_id(0) * examples

    def body(number, _):
        example, group = number // heads.groups, number % heads.groups
        compute(example, group, lengths[first + example] if masked else None)
        return 0

    jax.lax.fori_loop(0, examples * heads.groups, body, 0)


def _for_rows(queries: int, compute: Callable) -> None:
    """Calls compute(first row, number of rows) for all rows, or for blocks of ROWS rows and the rest."""
    if queries <= UNDIVIDED:
        compute(0, queries)
        return
    blocks = queries // ROWS

    def body(number, _):
        compute(pl.multiple_of(number * ROWS, ROWS), ROWS)
        return 0

    jax.lax.fori_loop(0, blocks, body, 0)
    if queries % ROWS:
        compute(blocks * ROWS, queries % ROWS)


def _place(refs: Sequence, part: int, group, heads: Heads):
    """Returns the array that holds queries (part 0), keys (1) or values (2), and a group's lanes in it."""
    ref, number = (refs[0], 3 * group + part) if heads.packed else (refs[part], group)
    if heads.groups > 1:
        return ref, pl.ds(pl.multiple_of(number * heads.width, LANES), heads.width)
    return ref, pl.ds(part * heads.width if heads.packed else 0, heads.width)


def _read(refs: Sequence, part: int, example, rows, group, heads: Heads) -> Array:
    """Returns a group's queries, keys or values of some rows of an example, (R, width)."""
    ref, lanes = _place(refs, part, group, heads)
    return ref[example, rows, lanes]


def _write(refs: Sequence, part: int, example, rows, group, values: Sequence[Array], heads: Heads) -> None:
    """Writes values, those of each head or all of a group, to where `_read` reads."""
    ref, lanes = _place(refs, part, group, heads)
    ref[example, rows, lanes] = jnp.concatenate(values, axis=1).astype(ref.dtype)


def _softmax(query: Array, key: Array, start, length, causal: bool) -> tuple[Array, Array]:
    """Returns exponentials of the scores of queries from row `start` on and all keys, (R, S), and their sums (R, 1)."""
    scores = _dot(query, key, 1, 1) * query.shape[1] ** -0.5
    columns = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    if causal:
        rows = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        scores = jnp.where(columns <= rows, scores, MASKED)
    if length is not None:
        scores = jnp.where(columns < length, scores, MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1, keepdims=True)


def _dot(x: Array, y: Array, axis_of_x: int, axis_of_y: int) -> Array:
    """Returns the product of two matrices in float32, summed over these axes.

    The kernel's compiler has only the lowest and the highest precision, and the latter for float32 only.
    """
    lowest = jax.config.jax_default_matmul_precision in (None, "default", "bfloat16", "fastest")
    precision = jax.lax.Precision.DEFAULT if lowest or x.dtype != jnp.float32 else jax.lax.Precision.HIGHEST
    axes = (((axis_of_x,), (axis_of_y,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
