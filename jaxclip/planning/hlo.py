"""Memory traffic and bytes sent between devices by a compiled program, computed from the text of its HLO."""

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
_INSTRUCTION = re.compile(r"^  (?P<root>ROOT )?%(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<opcode>[\w-]+)\((?P<rest>.*)$")
_ARRAY = re.compile(r"\b(?P<type>\w+)\[(?P<sizes>[\d,]*)\](?P<layout>\{[^}]*\})?")
_CALLS = re.compile(r"(?:calls|body|to_apply|branch_computations)=\{?(%[\w.-]+(?:, %[\w.-]+)*)")


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device moves in one run of a program.

    Attributes:
      memory: read from and written to its main memory.
      sent: sent to other devices, by collective, assuming ring algorithms: (n - 1) / n of the full array's bytes in a
        group of n devices, twice that for an all-reduce.
    """

    memory: float
    sent: dict[str, float]


@dataclass
class _Instruction:
    name: str
    opcode: str
    arrays: list[tuple[float, bool]]  # bytes of each, and whether it is in main memory
    operands: list[str]
    text: str
    root: bool

    def bytes(self) -> float:
        return sum(size for size, _ in self.arrays)

    def memory(self) -> float:
        return sum(size for size, main in self.arrays if main)


@dataclass
class _Computation:
    instructions: dict[str, _Instruction] = field(default_factory=dict)


def traffic(text: str) -> Traffic:
    """Returns the traffic of a program from its HLO text; a loop's body is counted once per iteration.

    A fusion that uses only a slice of an array reads only that slice. A TPU's vector memory (S(1)) is not counted.
    """
    computations, entry = _parse(text)
    runs = _runs(computations, entry)
    memory = 0.0
    # Keyed by channel, because an asynchronous collective appears in every computation that overlaps with it. All
    # permutes share one channel and appear once each.
    collectives: dict[str, tuple[str, float]] = {}
    for name, computation in computations.items():
        for instruction in computation.instructions.values():
            if runs.get(name, (0, True))[1] is False and instruction.opcode not in FREE:
                memory += runs[name][0] * _memory(instruction, computation, computations)
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES and name in runs:
                channel = re.search(r"channel_id=(\d+)", instruction.text)
                key = channel[1] if channel and kind != "collective-permute" else instruction.name
                sent = runs[name][0] * _sent(kind, instruction)
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
        elif found := _INSTRUCTION.match(line):
            operands = found["rest"].split(")", 1)[0]
            instruction = _Instruction(
                found["name"],
                found["opcode"],
                list(_arrays(found["shape"])),
                re.findall(r"%([\w.-]+)", operands),
                found["rest"],
                bool(found["root"]),
            )
            current.instructions[instruction.name] = instruction
    return computations, entry


def _arrays(shape: str) -> Iterator[tuple[float, bool]]:
    for found in _ARRAY.finditer(shape):
        sizes = [int(size) for size in found["sizes"].split(",") if size]
        yield BYTES.get(found["type"], 1) * math.prod(sizes), not re.search(r"S\([1-9]", found["layout"] or "")


def _runs(computations: dict[str, _Computation], entry: str) -> dict[str, tuple[float, bool]]:
    """Returns, for each computation, how often it runs and whether it is part of a fusion."""
    runs: dict[str, tuple[float, bool]] = {}

    def visit(name: str, times: float, fused: bool) -> None:
        before = runs.get(name, (0.0, fused))
        runs[name] = before[0] + times, fused
        for instruction in computations[name].instructions.values():
            inside = times * (_trips(instruction, computations) if instruction.opcode == "while" else 1)
            for called in _CALLS.findall(instruction.text):
                for part in re.findall(r"%([\w.-]+)", called):
                    visit(part, inside, fused or instruction.opcode not in ("while", "conditional", "call"))

    visit(entry, 1.0, False)
    return runs


def _trips(loop: _Instruction, computations: dict[str, _Computation]) -> int:
    """Returns a loop's trip count: XLA's if known, else the constant that its counter is compared with, else 1."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known[1])
    condition = re.search(r"condition=%([\w.-]+)", loop.text)
    inside = computations[condition[1]].instructions.values() if condition else ()
    bounds = [re.match(r"(\d+)\)", i.text) for i in inside if i.opcode == "constant"]
    return max((int(bound[1]) for bound in bounds if bound), default=1)


def _memory(instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation]) -> float:
    """Returns the bytes of main memory that one instruction outside of fusions reads and writes."""
    if instruction.opcode.endswith("-done") or instruction.opcode.endswith("-update"):
        return 0.0  # counted at its start
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
    return _fusion(instruction, operands, inside)


def _fusion(fusion: _Instruction, operands: list[_Instruction], inside: _Computation) -> float:
    users: dict[str, list[_Instruction]] = defaultdict(list)
    for instruction in inside.instructions.values():
        for operand in instruction.operands:
            users[operand].append(instruction)
    gathering = (i for i in inside.instructions.values() if i.opcode.removesuffix("-start") in COLLECTIVES)
    # A collective inside the fusion only overlaps with its work: its arrays are not read or written by the fusion.
    passing = {size for instruction in gathering for size, _ in instruction.arrays}
    total, in_place = 0.0, sum(size for size, main in fusion.arrays if main and size in passing)
    for instruction in inside.instructions.values():
        if instruction.opcode != "parameter":
            continue
        number = int(re.match(r"(\d+)", instruction.text)[1])
        if number >= len(operands) or not operands[number].memory() or operands[number].bytes() in passing:
            continue
        using = users[instruction.name]
        if using and all(user.opcode in SLICES for user in using):
            total += sum(user.bytes() for user in using)
        elif using and all(user.opcode == "dynamic-update-slice" for user in using):
            updates = sum(inside.instructions[user.operands[1]].bytes() for user in using)
            total, in_place = total + updates, in_place + instruction.bytes() - updates
        else:
            total += operands[number].memory()
    return total + max(0.0, fusion.memory() - in_place)


def _sent(kind: str, instruction: _Instruction) -> float:
    size = max((size for size, _ in instruction.arrays), default=0.0)
    if kind != "all-gather" and not instruction.opcode.endswith("-start"):
        size = instruction.bytes()
    count = _group(instruction.text)
    factor = (count - 1) / count
    if kind == "all-reduce":
        return 2 * factor * size
    if kind == "reduce-scatter":
        return factor * size * count
    return size if kind == "collective-permute" else factor * size


def _group(text: str) -> int:
    """Returns a collective's group size; groups are written as mesh axes, [groups,size]<=[...] or lists of ids."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return found[1].count(",") + 1
    return 2
