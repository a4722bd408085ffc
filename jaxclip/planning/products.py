"""FLOPs of the matrix products and convolutions of a compiled program, by the type and precision of their operands."""

import json
import math
import re
from collections import Counter

from jaxclip.planning.hlo import Array, Instruction, Program
from jaxclip.planning.memory import target

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
ATTENTION = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
"""Beginning of the target of a call of cuDNN's attention -> products of queries, keys and head size that it computes.

The backward pass computes the scores again."""

PALLAS = "tpu_custom_call"
"""Target of the call of a Pallas kernel; the FLOPs of its products are those that its cost estimate states."""

Kind = tuple[str, str]  # dtype and precision, the arguments of `hardware.Chip.peak`


def product_flops(instruction: Instruction, program: Program) -> Counter[Kind]:
    """Returns the FLOPs of an instruction and of the computation that it fuses, by (dtype, precision).

    A multiplication and an addition count as two. Positions of a convolution's window that lie in its padding or
    between the elements of a dilated operand do not count.
    """
    if instruction.opcode in ("dot", "convolution") and instruction.operands[0].arrays[0].dtype not in DTYPES:
        return Counter()  # of integers
    if instruction.opcode == "fusion":
        inner = (product_flops(part, program) for part in program.called(instruction)[0].instructions)
        return sum(inner, Counter())
    if instruction.opcode == "dot":
        return Counter({_kind(instruction): _dot(instruction)})
    if instruction.opcode == "convolution":
        return Counter({_kind(instruction): _convolution(instruction)})
    name = target(instruction) or ""
    if name.startswith("__cublas"):
        return Counter({_kind(instruction): _cublas(instruction)})
    for beginning, count in sorted(ATTENTION.items(), reverse=True):
        if name.startswith(beginning):
            query, key = (operand.arrays[0] for operand in instruction.operands[:2])
            return Counter({_kind(instruction): count * _attention(query, key)})
    if name == PALLAS:
        return Counter({_kind(instruction): _stated(instruction)})
    return Counter()


def _kind(instruction: Instruction) -> Kind:
    """Returns (dtype, precision) of a product: the wider type and the higher precision of its two operands."""
    dtypes = [operand.arrays[0].dtype for operand in instruction.operands]
    dtypes = [dtype for dtype in dtypes if dtype in DTYPES][:2]  # a kernel's operands may begin with integers
    dtype = DTYPES["f32" if "f32" in dtypes else sorted(dtypes)[0]]
    text = instruction.text.lower()
    precision = next((name for name in ("highest", "high") if re.search(rf'[{{",\[]{name}[}}",\]]', text)), "default")
    return dtype, precision


def _dot(dot: Instruction) -> float:
    contracted = _axes(dot, "lhs_contracting_dims")
    return (
        2.0 * math.prod(dot.arrays[0].sizes) * math.prod(dot.operands[0].arrays[0].sizes[axis] for axis in contracted)
    )


def _cublas(call: Instruction) -> float:
    config = json.loads(call.attribute(r"backend_config=(\{.*\})"))["gemm_backend_config"]
    sizes = call.operands[0].arrays[0].sizes
    contracted = config["dot_dimension_numbers"]["lhs_contracting_dimensions"]
    return 2.0 * math.prod(call.arrays[0].sizes) * math.prod(sizes[int(axis)] for axis in contracted)


def _stated(call: Instruction) -> float:
    return float(call.attribute(r'"cost_estimate":\{[^}]*"flops":"?(\d+)') or 0)


def _attention(query: Array, key: Array) -> float:
    """Returns the FLOPs of one product of attention from operands (batch, tokens, heads, head size)."""
    batch, queries, heads, size = query.sizes
    return 2.0 * batch * heads * queries * key.sizes[1] * size


def _convolution(convolution: Instruction) -> float:
    """Returns a convolution's FLOPs; on TPUs products are convolutions too, with batch axes as dilated windows."""
    left, right = (operand.arrays[0].sizes for operand in convolution.operands)
    lhs, rhs, out = re.match(r"(\w+)_(\w+)->(\w+)", convolution.attribute(r"dim_labels=(\S+?)(?:,|$)")).groups()
    output = convolution.arrays[0].sizes
    spatial = [label for label in out if label.isdigit()]
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", convolution.attribute(r"window=\{([^}]*)\}") or ""))
    positions = 1
    for axis in spatial:
        number = int(axis)

        def of(key: str, default: str, number: int = number) -> str:
            return window[key].split("x")[number] if key in window else default

        low, _ = map(int, of("pad", "0_0").split("_"))
        positions *= _valid_positions(
            left[lhs.index(axis)],
            right[rhs.index(axis)],
            output[out.index(axis)],
            low=low,
            stride=int(of("stride", "1")),
            dilation=(int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))),
        )
    features = right[rhs.index("i")] * output[out.index("f")]
    groups = int(convolution.attribute(r"batch_group_count=(\d+)") or 1)
    return 2.0 * positions * features * left[lhs.index("b")] / groups


def _valid_positions(size: int, window: int, output: int, *, low: int, stride: int, dilation: tuple[int, int]) -> int:
    """Returns how many pairs of an output and a window position of one axis meet an element of the operand."""
    count = 0
    last = (size - 1) * dilation[0]
    for position in range(window):
        offset = position * dilation[1] - low
        # Outputs o for which o * stride + offset is in [0, last] and a multiple of the operand's dilation.
        indices = range(offset, offset + output * stride, stride)
        if dilation[0] == 1:
            first = max(0, -(offset // stride)) if offset < 0 else 0
            end = min(output - 1, (last - offset) // stride) if last >= offset else -1
            count += max(0, end - first + 1)
        else:
            count += sum(1 for index in indices if 0 <= index <= last and index % dilation[0] == 0)
    return count


def _axes(instruction: Instruction, name: str) -> list[int]:
    axes = instruction.attribute(rf"{name}=\{{([\d,]*)\}}")
    return [int(axis) for axis in axes.split(",")] if axes else []
