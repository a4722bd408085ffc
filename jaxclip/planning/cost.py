"""What one run of a compiled program costs a device: FLOPs, memory traffic, network traffic, and what overlaps."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

from jaxclip.planning.hlo import Computation, Instruction, Program, collective, parse
from jaxclip.planning.memory import moved_bytes
from jaxclip.planning.network import Network, collectives
from jaxclip.planning.products import Kind, product_flops
from jaxclip.runtime.hardware import Chip


@dataclass(frozen=True)
class Operation:
    """All runs of one instruction: the name of the JAX operation, its kind in XLA, and bytes in main memory."""

    name: str
    kind: str
    times: float
    bytes: float


@dataclass
class Cost:
    """The cost of one run of a program for one device.

    Attributes:
      flops: (dtype, precision) -> FLOPs of matrix products and convolutions.
      traffic: bytes read from and written to main memory.
      inside: collective -> bytes sent to other devices of the slice or machine.
      between: collective -> bytes sent to other slices or machines.
      sent: collective -> bytes sent altogether. A permute sends its array either inside or between, not both.
      compute, memory, network: seconds of each at the peak rates of the data sheet.
      exposed: seconds of the network during which the program does nothing else.
      operations: every instruction that moves bytes, largest first.
    """

    flops: Counter[Kind] = field(default_factory=Counter)
    traffic: float = 0.0
    inside: Counter[str] = field(default_factory=Counter)
    between: Counter[str] = field(default_factory=Counter)
    sent: dict[str, float] = field(default_factory=dict)
    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    exposed: float = 0.0
    operations: list[Operation] = field(default_factory=list)


def program_cost(text: str, devices: Sequence[jax.Device], chip: Chip) -> Cost:
    """Returns the cost of a program, given its HLO text and its devices in the order of their numbers in it."""
    program, network, cost = parse(text), Network(devices, chip), Cost()
    for instruction, times in program.executed():
        for kind, flops in product_flops(instruction, program).items():
            cost.flops[kind] += flops * times
        if moved := moved_bytes(instruction, program) * times:
            name = instruction.attribute(r'op_name="([^"]*)"') or instruction.name
            cost.operations.append(Operation(name, instruction.opcode, times, moved))
    for instruction, _, times in collectives(program):
        transfer = network.transfer(instruction)
        cost.inside[transfer.kind] += transfer.inside * times
        cost.between[transfer.kind] += transfer.between * times
        cost.network += transfer.seconds * times
    for kind in cost.inside:
        both = cost.inside[kind], cost.between[kind]
        cost.sent[kind] = max(both) if kind == "collective-permute" else sum(both)
    cost.operations.sort(key=lambda operation: -operation.bytes)
    cost.traffic = sum(operation.bytes for operation in cost.operations)
    cost.memory = cost.traffic / chip.memory_bandwidth
    cost.compute = _compute_seconds(cost.flops, chip)
    cost.exposed = _Schedule(program, network, chip).exposed()
    return cost


def _compute_seconds(flops: Counter[Kind], chip: Chip) -> float:
    return sum(count / chip.peak(*kind) for kind, count in flops.items())


class _Schedule:
    """Follows a program in the order in which it runs, to find how long it does nothing but wait for collectives."""

    def __init__(self, program: Program, network: Network, chip: Chip):
        self._program, self._network, self._chip = program, network, chip

    def exposed(self) -> float:
        """Returns the seconds of collectives that no other work of the program hides.

        A collective in one piece is not hidden at all, nor one that XLA marks as synchronous. Others are hidden by the
        instructions between their start and their end, and those in fusions by the fusions' own work.
        """
        _, exposed = self._run(self._program.computations[self._program.entry])
        for instruction, fusions, times in collectives(self._program):
            if fusions:
                hidden = sum(self._seconds(fusion) for fusion in fusions)
                exposed += times * max(0.0, self._network.transfer(instruction).seconds - hidden)
        return exposed

    def _run(self, computation: Computation) -> tuple[float, float]:
        """Returns the seconds of work of one run of a computation, and those of collectives that it does not hide."""
        busy = exposed = 0.0
        started: dict[Instruction | str, tuple[Instruction, float]] = {}
        for instruction in computation.instructions:
            kind = collective(instruction)
            if kind and (instruction.opcode == kind or '"is_sync":true' in instruction.text):
                exposed += self._network.transfer(instruction).seconds
            elif kind and not instruction.opcode.endswith("-done"):
                started[_meeting(instruction) or instruction] = instruction, busy
            elif instruction.opcode.endswith("-done") and (key := _start(instruction)) in started:
                start, before = started[key]
                exposed += max(0.0, self._network.transfer(start).seconds - (busy - before))
            else:
                for inner, times in self._program.parts(instruction):
                    more_busy, more_exposed = self._run(inner)
                    busy, exposed = busy + times * more_busy, exposed + times * more_exposed
                busy += self._seconds(instruction) if instruction.opcode != "recv" else 0.0  # writes when data arrive
        return busy, exposed

    def _seconds(self, instruction: Instruction) -> float:
        """Returns the shortest time of an instruction outside of loops, at the rates of the data sheet."""
        compute = _compute_seconds(product_flops(instruction, self._program), self._chip)
        return max(compute, moved_bytes(instruction, self._program) / self._chip.memory_bandwidth)


def _start(done: Instruction) -> Instruction | str | None:
    """Returns the key in `_Schedule._run` of the collective that an instruction ends."""
    start = done.operands[0]
    if start.opcode == "recv":
        return _meeting(start)
    return start if collective(start) else None


def _meeting(instruction: Instruction) -> str | None:
    """Returns the name that a send to another slice shares with the recv of its answer."""
    return instruction.attribute(r'_xla_host_transfer_rendezvous="([^"]+)"')
