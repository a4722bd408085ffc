"""Bytes that the collectives of a compiled program send over each network, and the time that this takes."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxclip.planning.hlo import Instruction, Program, collective
from jaxclip.planning.memory import results
from jaxclip.runtime.hardware import Chip
from jaxclip.runtime.mesh import slice_of


@dataclass(frozen=True)
class Transfer:
    """What one device sends in one run of a collective.

    Attributes:
      kind: the collective, such as "all-reduce".
      inside: bytes sent within a slice of TPUs or a machine of GPUs.
      between: bytes sent to other slices or machines.
      seconds: the time of both, one after the other.
    """

    kind: str
    inside: float
    between: float
    seconds: float


class Network:
    """The devices of a program, in the order of their numbers in it, and the links between them.

    A TPU has a link to each neighbour along an axis of its slice; GPUs of a machine are joined by switches. A slice or
    a machine reaches the others by the network of the data centre.
    """

    def __init__(self, devices: Sequence[jax.Device], chip: Chip):
        self._chip = chip
        self._domain = np.array([slice_of(device) for device in devices])
        # XLA compiles one program for each slice of TPUs, whose collectives are those of the slice.
        self._program_devices = len(devices) if chip.gpu else len(devices) // self.domains
        self._position = None if chip.gpu else np.array([d.coords for d in devices])  # (devices, 3)
        self._shape = None if chip.gpu else self._position.max(axis=0) + 1

    @property
    def domains(self) -> int:
        """Number of slices or machines."""
        return len(np.unique(self._domain))

    def transfer(self, instruction: Instruction) -> Transfer:
        """Returns what each device sends in one run of a collective, by algorithms that send the fewest bytes.

        An all-gather of an array of S bytes over n devices sends (n - 1) / n x S, a reduce-scatter of an array of S
        bytes per device the same, an all-reduce twice as much. Over m slices of k devices it sends (k - 1) / k x S
        inside of them and (m - 1) / m x S / k between them. A permute sends the whole array.
        """
        kind = collective(instruction)
        if instruction.opcode == "send":
            return self._between_slices(kind, instruction.operands[0].bytes)
        size = _size(kind, instruction)
        if kind == "collective-permute":
            return self._permute(size, instruction)
        groups = device_groups(instruction.text, self._program_devices)
        group = groups[0]
        domains = len(np.unique(self._domain[group]))
        local = len(group) // domains
        rounds = 2 if kind == "all-reduce" else 1
        inside = rounds * size * ((local - 1) / len(group) if kind == "all-to-all" else (local - 1) / local)
        between = rounds * size * (domains - 1) / domains / (1 if kind == "all-to-all" else local)
        seconds = inside / (self._links(group) * self._chip.link) + between / self._chip.between
        return Transfer(kind, inside, between, seconds)

    def _permute(self, size: float, instruction: Instruction) -> Transfer:
        """Returns the transfer of a permute, which uses one link of a device, not all of them."""
        text = instruction.attribute(
            r"source_target_pairs=(\{\}|\{\{.*?\}\})"
        )  # some permutes only synchronise a device
        pairs = np.array(_id_lists(text), int).reshape(-1, 2)
        crossing = self._domain[pairs[:, 0]] != self._domain[pairs[:, 1]]
        inside, between = float(size * (not crossing.all())), float(size * crossing.any())
        seconds = max(inside / self._chip.link, between / self._chip.between)  # different devices, at the same time
        return Transfer("collective-permute", inside, between, seconds)

    def _between_slices(self, kind: str, size: float) -> Transfer:
        """Returns the transfer of what a TPU hands to its host for the other slices, an array of `size` bytes."""
        slices = self.domains
        shares = {"all-reduce": 2 * (slices - 1) / slices, "all-gather": slices - 1, "collective-permute": 1}
        between = size * shares.get(kind, (slices - 1) / slices)
        return Transfer(kind, 0.0, between, between / self._chip.between)

    def _links(self, group: np.ndarray) -> int:
        """Returns how many links a device of a group can use: two per axis of a torus along which the group extends.

        An axis that is not closed to a ring counts once, because the devices at its ends have one neighbour only.
        """
        if self._position is None:
            return 1
        first = group[self._domain[group] == self._domain[group[0]]]
        extent = np.ptp(self._position[first], axis=0) > 0
        rings = self._shape % self._chip.wraps == 0
        return max(1, int(np.sum(np.where(rings, 2, 1)[extent])))


def collectives(program: Program) -> Iterator[tuple[Instruction, list[Instruction], float]]:
    """Yields each collective, the fusions that it overlaps with, and how often it runs.

    An asynchronous collective of a TPU appears in several fusions: one starts it, one waits for its end, and those
    between them advance it while they compute.
    """
    fused: dict[str, list[tuple[Instruction, Instruction, float]]] = {}
    for instruction, times in program.executed():
        if collective(instruction) and not instruction.opcode.endswith("-done"):
            yield instruction, [], times
        elif instruction.opcode == "fusion":
            for inner in _inside(instruction, program):
                channel = inner.attribute(r"channel_id=(\d+)") or inner.name
                key = inner.name if collective(inner) == "collective-permute" else channel
                fused.setdefault(key, []).append((inner, instruction, times))
    for found in fused.values():
        inner, _, times = min(found, key=lambda item: item[2])
        yield inner, [fusion for _, fusion, _ in found], times


def _inside(fusion: Instruction, program: Program) -> Iterator[Instruction]:
    for instruction in program.called(fusion)[0].instructions:
        if collective(instruction) and not instruction.opcode.endswith("-done"):
            yield instruction
        elif instruction.opcode == "fusion":
            yield from _inside(instruction, program)


def device_groups(text: str, devices: int) -> np.ndarray:
    """Returns (groups, devices of a group) the numbers of the devices that take part in a collective together.

    `text` is that of the instruction, which has one of XLA's notations: mesh['data'=2,'fsdp'=4] {'fsdp'}, perhaps with
    device_ids=([4,2]T(1,0)); [2,4]<=[8], perhaps with a transposition; or {{0,1},{2,3}}.

    Raises:
      ValueError: the notation is none of these.
    """
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        names, grouped = list(sizes), re.findall(r"'([^']+)'", match[3])
        ids = _device_ids(match[2]) if match[2] else np.arange(math.prod(sizes.values()))
        ids = ids.reshape(*sizes.values())
        order = [names.index(name) for name in (*(name for name in names if name not in grouped), *grouped)]
        return ids.transpose(order).reshape(-1, math.prod(sizes[name] for name in grouped))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _device_ids(match[3]).reshape(int(match[1]), int(match[2]))
    if match := re.search(r"replica_groups=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", text):
        return np.array(_id_lists(match[1]))
    if "replica_groups={}" in text:
        return np.arange(devices)[None]
    raise ValueError(f"cannot read the device groups of a collective: {text[:300]}")


def _device_ids(text: str) -> np.ndarray:
    """Returns the numbers of devices in the order of a notation such as [4,2]T(1,0): a range, reshaped, transposed."""
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"cannot read the device numbers of a collective: {text}")
    ids = np.arange(math.prod(_integers(match[1]))).reshape(_integers(match[1]))
    return ids.transpose(_integers(match[2])) if match[2] else ids


def _id_lists(text: str) -> list[list[int]]:
    return [_integers(ids) for ids in re.findall(r"\{([\d,]+)\}", text)]


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _size(kind: str, instruction: Instruction) -> float:
    """Returns the bytes of the whole array of a collective: the result, or what a reduce-scatter starts from."""
    if kind in ("reduce-scatter", "all-to-all"):
        return sum(operand.bytes for operand in instruction.operands)
    return sum(array.bytes for array in results(instruction))
