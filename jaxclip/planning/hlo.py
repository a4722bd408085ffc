"""Reads a compiled program from its HLO text: computations, instructions, arrays, and how often each runs."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32,
        "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "token": 0, "opaque": 0}  # fmt: skip
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
        "opt-barrier", "add-dependency", "partition-id", "replica-id"}  # fmt: skip
"""Opcodes that move no bytes themselves."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (?P<root>ROOT )?%(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<opcode>[\w-]+)\((?P<rest>.*)$")
_ARRAY = re.compile(r"\b(?P<type>[a-z]\w*)\[(?P<sizes>[\d,<=]*)\](?:\{(?P<order>[\d,]*)(?P<layout>[^}]*)\})?")
_TILE = re.compile(r"\((\d+(?:,\d+)*)\)")


@dataclass(frozen=True)
class Array:
    """An operand or a result as it lies in memory.

    Attributes:
      dtype: XLA's name of the type, such as "bf16".
      sizes: the size of each axis.
      bytes: bytes in memory, including the padding to whole tiles that a TPU's layout adds.
      main: whether it is in the device's main memory rather than, for example, in a TPU's vector memory. Scalars never
        are, wherever the program puts them.
    """

    dtype: str
    sizes: tuple[int, ...]
    bytes: float
    main: bool


@dataclass(eq=False)
class Instruction:
    """One line of a program.

    Attributes:
      name: its name, unique in the program.
      opcode: XLA's name of the operation.
      arrays: the results; several if the result is a tuple.
      operands: the instructions whose results it takes.
      users: the instructions of the same computation that take its result.
      text: operands and attributes as XLA prints them.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple["Instruction", ...]
    text: str
    users: list["Instruction"] = field(default_factory=list, repr=False)

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    @property
    def main_bytes(self) -> float:
        return sum(array.bytes for array in self.arrays if array.main)

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of the first match of a regular expression in the text, or None."""
        match = re.search(pattern, self.text)
        return match[1] if match else None


@dataclass(eq=False)
class Computation:
    """Instructions in the order in which they run; `root` is the one that gives the result."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    root: Instruction | None = None

    def parameters(self) -> dict[int, Instruction]:
        """Returns the parameters by their number."""
        found = (i for i in self.instructions if i.opcode == "parameter")
        return {int(instruction.attribute(r"^(\d+)")): instruction for instruction in found}


@dataclass
class Program:
    """The computations of a compiled program by name, and the name of the one that is run."""

    computations: Mapping[str, Computation]
    entry: str

    def called(self, instruction: Instruction, key: str = "calls") -> list[Computation]:
        """Returns the computations named by an attribute of an instruction, such as calls, body or condition."""
        match = re.search(rf"\b{key}=\{{?(%[\w.-]+(?:, ?%[\w.-]+)*)", instruction.text)
        return [self.computations[name] for name in re.findall(r"%([\w.-]+)", match[1])] if match else []

    def executed(self) -> Iterator[tuple[Instruction, float]]:
        """Yields every instruction that runs outside of fusions, and how often it runs.

        An instruction inside a loop runs once per iteration. Of a conditional, the branch with the most bytes of
        results runs.
        """
        yield from self._executed(self.computations[self.entry], 1.0)

    def _executed(self, computation: Computation, times: float) -> Iterator[tuple[Instruction, float]]:
        for instruction in computation.instructions:
            yield instruction, times
            for inner, count in self.parts(instruction):
                yield from self._executed(inner, times * count)

    def parts(self, instruction: Instruction) -> list[tuple[Computation, int]]:
        """Returns the computations that an instruction runs, and how often: those of a loop, a call or a conditional.

        Raises:
          ValueError: a loop has no known number of iterations.
        """
        if instruction.opcode == "while":
            count = self._trip_count(instruction)
            return [(inner, count) for key in ("body", "condition") for inner in self.called(instruction, key)]
        if instruction.opcode in ("call", "async-start"):
            return [(inner, 1) for inner in self.called(instruction, "to_apply") or self.called(instruction)]
        if instruction.opcode == "conditional":
            return [(self._costliest_branch(instruction), 1)]
        return []

    def _costliest_branch(self, conditional: Instruction) -> Computation:
        branches = self.called(conditional, "branch_computations") or [
            *self.called(conditional, "true_computation"),
            *self.called(conditional, "false_computation"),
        ]
        return max(branches, key=lambda branch: sum(i.bytes * times for i, times in self._executed(branch, 1.0)))

    def _trip_count(self, loop: Instruction) -> int:
        """Returns how often a loop runs: XLA's own count if the text has it, else that of `counter < limit`.

        Start, step and limit of the counter must be constants.

        Raises:
          ValueError: the loop is of another form.
        """
        if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        (condition,), (body,), initial = self.called(loop, "condition"), self.called(loop, "body"), loop.operands[0]
        compare = next((i for i in condition.instructions if i.opcode == "compare"), None)
        if compare is not None and compare.attribute(r"direction=(\w+)") == "LT":
            counter, limit = map(_source, compare.operands)
            index = counter.attribute(r"index=(\d+)")
            if index is not None and initial.opcode == body.root.opcode == "tuple":
                start, following = (_source(values.operands[int(index)]) for values in (initial, body.root))
                step = next((part for part in following.operands if part.opcode == "constant"), None)
                if start.opcode == limit.opcode == "constant" and following.opcode == "add" and step is not None:
                    return -(-(_integer(limit) - _integer(start)) // _integer(step))
        raise ValueError(
            f"cannot tell how often the loop {loop.name} runs: its counter has no constant start, step and limit"
        )


def parse(text: str) -> Program:
    """Returns the program of an HLO text, as `jax.stages.Compiled.as_text` gives it.

    Raises:
      ValueError: the text has no entry computation, or an array of an unknown type.
    """
    computations: dict[str, Computation] = {}
    entry, current, local = "", None, {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current, local = Computation(header["name"]), {}
            computations[current.name] = current
            entry = current.name if header["entry"] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            names = re.findall(r"%([\w.-]+)", match["rest"].split(")", 1)[0])
            operands = tuple(local[name] for name in names)
            instruction = Instruction(
                match["name"], match["opcode"], tuple(arrays(match["shape"])), operands, match["rest"]
            )
            current.instructions.append(instruction)
            local[instruction.name] = instruction
            for operand in dict.fromkeys(operands):
                operand.users.append(instruction)
            if match["root"]:
                current.root = instruction
    if not entry:
        raise ValueError("the HLO text has no ENTRY computation")
    return Program(computations, entry)


def arrays(shape: str) -> Iterator[Array]:
    """Yields the arrays of a shape or of nested tuples of shapes, as HLO text prints them."""
    for match in _ARRAY.finditer(shape):
        dtype, layout = match["type"], match["layout"] or ""
        sizes = tuple(int(size.lstrip("<=")) for size in match["sizes"].split(",") if size)
        if dtype not in BITS and not dtype.startswith("f8"):
            raise ValueError(f"the HLO text has an array of unknown type, {match[0]}")
        order = [int(axis) for axis in (match["order"] or "").split(",") if axis]
        physical = [sizes[axis] for axis in reversed(order)] if order else list(sizes)
        size = _padded_elements(physical, layout) * BITS.get(dtype, 8) / 8
        yield Array(dtype, sizes, size, main=bool(sizes) and not re.search(r"S\([1-9]", layout))


def collective(instruction: Instruction) -> str | None:
    """Returns the kind of a collective, also of the halves of an asynchronous one; None for other instructions.

    Between TPU slices it is a `send` to the host, which names the kind of collective that the hosts carry out.
    """
    if instruction.opcode == "send":
        kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
        return kind and kind.lower().replace("_", "-").replace("one-to-one", "collective-permute")
    kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
    return kind if kind in COLLECTIVES else None


def _padded_elements(sizes: list[int], layout: str) -> int:
    """Returns the number of elements that an array occupies; `sizes` are in the order from major to minor.

    The layout T(8,128)(2,1) cuts the two minor axes into tiles of 8 x 128, which lie in memory as wholes, and each of
    these into tiles of 2 x 1 (https://openxla.org/xla/tiled_layout).
    """
    tiles = re.search(r"T((?:\(\d+(?:,\d+)*\))+)", layout)
    for tile in _TILE.findall(tiles[1]) if tiles else ():
        tile_sizes = [int(size) for size in tile.split(",")]
        sizes = [1] * (len(tile_sizes) - len(sizes)) + sizes
        split = len(sizes) - len(tile_sizes)
        counts = [-(-size // width) for size, width in zip(sizes[split:], tile_sizes, strict=True)]
        sizes = [*sizes[:split], *counts, *tile_sizes]
    return math.prod(sizes)


def _source(instruction: Instruction) -> Instruction:
    """Returns the instruction whose value this one passes on unchanged, or itself."""
    while instruction.opcode in ("copy", "bitcast", "convert") and instruction.operands:
        (instruction,) = instruction.operands
    return instruction


def _integer(constant: Instruction) -> int:
    return int(constant.attribute(r"^(-?\d+)\)"))
