"""Memory traffic of a compiled program and the bytes it sends between devices, computed from its HLO text."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
         "u64": 8, "f64": 8}  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
SLICES = {"dynamic-slice", "slice", "gather"}

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<opcode>[\w-]+)\((?P<rest>.*)$")
_ARRAY = re.compile(r"\b(?P<type>\w+)\[(?P<sizes>[\d,]*)\](?P<layout>\{[^}]*\})?")
_CALLS = re.compile(r"(?:calls|body|to_apply|branch_computations)=\{?(%[\w.-]+(?:, %[\w.-]+)*)")


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device moves in one run of a program.

    Attributes:
      memory: read from and written to its main memory.
      sent: sent to other devices, by collective, assuming ring algorithms: (n - 1) / n of the full array's bytes in a
        group of n devices, twice that for an all-reduce, and all of the array's bytes for a collective-permute.
    """

    memory: float
    sent: dict[str, float]


@dataclass
class _Instruction:
    name: str
    opcode: str
    arrays: list[tuple[float, bool]]  # bytes of each output array, and whether it is in main memory
    operands: list[str]
    text: str

    def bytes(self) -> float:
        return sum(size for size, _ in self.arrays)

    def memory(self) -> float:
        return sum(size for size, main in self.arrays if main)


@dataclass
class _Computation:
    instructions: dict[str, _Instruction] = field(default_factory=dict)


def traffic(text: str) -> Traffic:
    """Returns the traffic of a program from its HLO text; a loop's body is counted once per iteration.

    All branches of a conditional are counted. A fusion that uses only a slice of an array counts as reading only that
    slice. Arrays outside of the main memory, such as those in a TPU's vector memory (S(1)), are not counted.
    """
    computations, entry = _parse(text)
    runs = _count_runs(computations, entry)
    memory = 0.0
    # Keyed by channel, because an asynchronous collective appears in every computation that overlaps with it. Permutes
    # are keyed by name: they all share one channel, and each appears once.
    collectives: dict[str, tuple[str, float]] = {}
    for name, computation in computations.items():
        for instruction in computation.instructions.values():
            if runs.get(name, (0, True))[1] is False and instruction.opcode not in FREE:
                memory += runs[name][0] * _memory_bytes(instruction, computation, computations)
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES and name in runs:
                channel = re.search(r"channel_id=(\d+)", instruction.text)
                key = channel[1] if channel and kind != "collective-permute" else instruction.name
                sent = runs[name][0] * _sent_bytes(kind, instruction)
                collectives[key] = kind, min(sent, collectives.get(key, (kind, sent))[1])
    sent: dict[str, float] = defaultdict(float)
    for kind, size in collectives.values():
        sent[kind] += size
    return Traffic(memory, dict(sent))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", _Computation()
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header["name"]] = _Computation()
            entry = header["name"] if header["entry"] else entry
        elif match := _INSTRUCTION.match(line):
            operands = match["rest"].split(")", 1)[0]
            instruction = _Instruction(
                match["name"],
                match["opcode"],
                list(_arrays(match["shape"])),
                re.findall(r"%([\w.-]+)", operands),
                match["rest"],
            )
            current.instructions[instruction.name] = instruction
    return computations, entry


def _arrays(shape: str) -> Iterator[tuple[float, bool]]:
    """Yields the bytes of each array in a shape or tuple of shapes, and whether it is in main memory."""
    for match in _ARRAY.finditer(shape):
        sizes = [int(size) for size in match["sizes"].split(",") if size]
        yield BYTES.get(match["type"], 1) * math.prod(sizes), not re.search(r"S\([1-9]", match["layout"] or "")


def _count_runs(computations: dict[str, _Computation], entry: str) -> dict[str, tuple[float, bool]]:
    """Returns for each computation how often it runs, and whether it is part of one instruction, such as a fusion."""
    runs: dict[str, tuple[float, bool]] = {}

    def visit(name: str, times: float, fused: bool) -> None:
        before = runs.get(name, (0.0, fused))
        runs[name] = before[0] + times, fused
        for instruction in computations[name].instructions.values():
            inner_times = times * (_trip_count(instruction, computations) if instruction.opcode == "while" else 1)
            for called in _CALLS.findall(instruction.text):
                for part in re.findall(r"%([\w.-]+)", called):
                    visit(part, inner_times, fused or instruction.opcode not in ("while", "conditional", "call"))

    visit(entry, 1.0, False)
    return runs


def _trip_count(loop: _Instruction, computations: dict[str, _Computation]) -> int:
    """Returns a loop's trip count: XLA's if stated, else the largest constant in its condition, else 1."""
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(match[1])
    condition = re.search(r"condition=%([\w.-]+)", loop.text)
    instructions = computations[condition[1]].instructions.values() if condition else ()
    constants = [re.match(r"(\d+)\)", i.text) for i in instructions if i.opcode == "constant"]
    return max((int(constant[1]) for constant in constants if constant), default=1)


def _memory_bytes(instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation]) -> float:
    """Returns the bytes of main memory that one instruction outside of fusions reads and writes."""
    if instruction.opcode.endswith("-done") or instruction.opcode.endswith("-update"):
        return 0.0  # counted at the instruction that starts it
    operands = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
    if instruction.opcode in SLICES:
        return 2 * instruction.memory()
    if instruction.opcode.removesuffix("-start") in SLICES:
        size, main = instruction.arrays[len(instruction.operands)]  # the outputs follow the operands
        return 2 * size if main else size
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1].memory()
    if instruction.opcode == "dynamic-update-slice-start":
        return operands[1].memory() + (operands[1].bytes() if operands[0].memory() else 0.0)
    called = _CALLS.search(instruction.text)
    if instruction.opcode != "fusion" or not called:
        written = 0.0 if instruction.opcode.endswith("-start") else instruction.memory()
        return written + sum(operand.memory() for operand in operands)
    inside = computations[re.findall(r"%([\w.-]+)", called[1])[0]]
    return _fusion_bytes(instruction, operands, inside)


def _fusion_bytes(fusion: _Instruction, operands: list[_Instruction], inside: _Computation) -> float:
    """Returns the bytes of main memory that a fusion reads and writes; `inside` is its computation."""
    users: dict[str, list[_Instruction]] = defaultdict(list)
    for instruction in inside.instructions.values():
        for operand in instruction.operands:
            users[operand].append(instruction)
    collectives = (i for i in inside.instructions.values() if i.opcode.removesuffix("-start") in COLLECTIVES)
    # A collective inside the fusion only overlaps with its work: the fusion neither reads nor writes its arrays. They
    # are recognised by their size.
    collective_sizes = {size for instruction in collectives for size, _ in instruction.arrays}
    total, not_written = 0.0, sum(size for size, main in fusion.arrays if main and size in collective_sizes)
    for instruction in inside.instructions.values():
        if instruction.opcode != "parameter":
            continue
        number = int(re.match(r"(\d+)", instruction.text)[1])
        if number >= len(operands) or not operands[number].memory() or operands[number].bytes() in collective_sizes:
            continue
        its_users = users[instruction.name]
        if its_users and all(user.opcode in SLICES for user in its_users):
            total += sum(user.bytes() for user in its_users)
        elif its_users and all(user.opcode == "dynamic-update-slice" for user in its_users):
            updates = sum(inside.instructions[user.operands[1]].bytes() for user in its_users)
            total, not_written = total + updates, not_written + instruction.bytes() - updates
        else:
            total += operands[number].memory()
    return total + max(0.0, fusion.memory() - not_written)


def _sent_bytes(kind: str, instruction: _Instruction) -> float:
    """Returns the bytes that one device sends in one run of a collective."""
    size = max((size for size, _ in instruction.arrays), default=0.0)
    if kind != "all-gather" and not instruction.opcode.endswith("-start"):
        size = instruction.bytes()
    count = _group_size(instruction.text)
    factor = (count - 1) / count
    if kind == "all-reduce":
        return 2 * factor * size
    if kind == "reduce-scatter":
        return factor * size * count
    return size if kind == "collective-permute" else factor * size


def _group_size(text: str) -> int:
    """Returns a collective's group size, 2 if none is found in mesh axes, [groups,size]<=[...] or lists of ids."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return match[1].count(",") + 1
    return 2
