"""Bytes of main memory that one instruction of a compiled program reads and writes."""

from collections.abc import Sequence

from jaxclip.planning.hlo import FREE, Array, Instruction, Program, collective

SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = ("dynamic-update-slice", "scatter")
VIEWS = ("bitcast", "reshape", "transpose", "copy", "convert")
"""Opcodes that, inside a fusion, read of their operand only the share that is read of their result."""
NO_TRAFFIC = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}
"""Targets of custom calls that only name memory."""
LIBRARIES = ("__cublas", "__cudnn")
"""Beginnings of the targets of calls of NVIDIA's libraries; their results of type s8 and u8 are scratch memory."""


def moved_bytes(instruction: Instruction, program: Program) -> float:
    """Returns the bytes that an instruction outside of fusions reads from and writes to main memory.

    An operand is read once. Where only slices of it are used, also inside nested fusions, only the slices are read. A
    result is written once; if it is an operand of which slices are updated in place, only the slices are written. The
    instruction that starts an asynchronous operation counts for the whole operation. Arrays outside of main memory,
    such as those in a TPU's vector memory, do not count.
    """
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in FREE or opcode.endswith(("-done", "-update")) or opcode == "async-start":
        return 0.0
    if target(instruction) in NO_TRAFFIC:
        return 0.0
    if opcode == "send":
        return operands[0].main_bytes
    if opcode == "copy-start":  # the results are the copy, the original and a flag
        copy = instruction.arrays[0]
        return copy.bytes * (copy.main + operands[0].arrays[0].main)
    if opcode in ("slice-start", "dynamic-slice-start"):  # the results are the operands, the slice and a flag
        part = instruction.arrays[len(operands)]
        return part.bytes * (part.main + operands[0].arrays[0].main)
    if opcode == "dynamic-update-slice-start":
        whole, part = operands[0].arrays[0], operands[1].arrays[0]
        return part.bytes * (whole.main + part.main)
    read = sum(operand.main_bytes * _share_read(instruction, operand, program) for operand in dict.fromkeys(operands))
    return read + _written(instruction, program)


def target(instruction: Instruction) -> str | None:
    """Returns the name of the function that a custom call calls; None for other instructions."""
    return instruction.attribute(r'custom_call_target="([^"]+)"') if instruction.opcode == "custom-call" else None


def _share_read(user: Instruction, operand: Instruction, program: Program) -> float:
    """Returns the share of an operand that an instruction reads, over all places at which it takes the operand."""
    places = (place for place, other in enumerate(user.operands) if other is operand)
    return min(1.0, sum(_share_read_at(user, place, program) for place in places))


def _share_read_at(user: Instruction, place: int, program: Program) -> float:
    size = user.operands[place].bytes or 1.0
    if user.opcode in SLICES and place == 0:
        return user.bytes / size
    if user.opcode == "dynamic-update-slice" and place == 0:
        return 0.0
    if user.opcode == "scatter" and place < len(user.arrays):
        return _update_bytes(user) / size  # the rows that change are read, changed and written
    if user.opcode == "fusion":
        return _share_used(program.called(user)[0].parameters()[place], program)
    return 1.0


def _share_used(value: Instruction, program: Program) -> float:
    """Returns the share of a value inside a fusion that is read there."""
    share = 0.0
    for user in value.users:
        if user.opcode in VIEWS and user.users:
            share += _share_used(user, program)
        elif collective(user) is None:  # a collective inside a fusion only overlaps with the fusion's work
            share += _share_read(user, value, program)
    return min(1.0, share)


def _written(instruction: Instruction, program: Program) -> float:
    """Returns the bytes of its results that an instruction writes to main memory."""
    if instruction.opcode == "fusion":
        return _written_by_fusion(instruction, program)
    if instruction.opcode in UPDATES:
        return _update_bytes(instruction) if instruction.main_bytes else 0.0
    return sum(array.bytes for array in results(instruction) if array.main)


def results(instruction: Instruction) -> Sequence[Array]:
    """Returns the results of an instruction, without operands that it passes on and without scratch memory."""
    arrays, count = instruction.arrays, sum(len(operand.arrays) for operand in instruction.operands)
    if collective(instruction) and instruction.opcode.endswith("-start"):
        return arrays[:count] if instruction.opcode == "all-reduce-start" else arrays[count : 2 * count]
    if (target(instruction) or "").startswith(LIBRARIES):
        return [array for array in arrays if array.dtype not in ("s8", "u8")]
    return arrays


def _written_by_fusion(fusion: Instruction, program: Program) -> float:
    root = program.called(fusion)[0].root
    values = root.operands if root.opcode == "tuple" else (root,)
    if len(values) != len(fusion.arrays):  # tuples of tuples
        return fusion.main_bytes
    pairs = zip(fusion.arrays, values, strict=True)
    return sum(array.bytes * _share_written(value, program) for array, value in pairs if array.main)


def _share_written(value: Instruction, program: Program) -> float:
    """Returns the share of a fusion's result that it writes: less than 1 if it updates an operand in place."""
    while value.opcode in VIEWS:
        (value,) = value.operands
    if value.opcode in UPDATES and _is_parameter(value.operands[0], program):
        return min(1.0, _update_bytes(value) / (value.bytes or 1.0))
    if value.opcode == "fusion" and (root := program.called(value)[0].root).opcode != "tuple":
        return _share_written(root, program)
    return 0.0 if collective(value) else 1.0


def _is_parameter(value: Instruction, program: Program) -> bool:
    """Returns whether a value inside a fusion is an operand of the fusion, perhaps in another shape."""
    while value.opcode in VIEWS:
        (value,) = value.operands
    if value.opcode == "fusion":
        return _is_parameter(program.called(value)[0].root, program)
    return value.opcode == "parameter"


def _update_bytes(update: Instruction) -> float:
    """Returns the bytes that a dynamic-update-slice or a scatter writes into its operand."""
    parts = (
        update.operands[1:2] if update.opcode == "dynamic-update-slice" else update.operands[len(update.arrays) + 1 :]
    )
    return sum(part.bytes for part in parts)
