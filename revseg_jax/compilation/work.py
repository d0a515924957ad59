"""What a compiled program does: which instructions run how often, and what each of them moves and multiplies.

XLA's own cost analysis counts the body of a loop once. Here a loop counts as often as it runs, so that scanned layers
and chunks count in full.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from revseg_jax.compilation.collectives import COLLECTIVES, collective_bytes, partition_group
from revseg_jax.compilation.hlo import Array, Computation, Instruction, Program
from revseg_jax.compilation.products import cudnn_flops, product_flops

FREE = frozenset(
    """
    parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id add-dependency opt-barrier
    domain async-done async-update copy-done send recv send-done recv-done
    """.split()
)
_TRANSFERS = {  # as libtpu calls collectives between slices
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
    "REDUCE_SCATTER": "reduce-scatter",
}
SLICING = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Work:
    """What one instruction does each time it runs, on one chip.

    Attributes:
      kind: "compute", "kernel" (a Pallas kernel) or the name of a collective
      source: where in the JAX program it comes from
      flops: of matrix products; not counted for kernels
      bytes: to and from the chip's memory; of a collective the whole arrays
      times: how often it runs
      group: of a collective, the partitions that take part in it with partition 0's
      arrays: of a kernel, its operands
      slices: of a collective between slices of a pod, how many; 0 for others
    """

    kind: str
    source: str
    flops: float
    bytes: float
    times: float
    group: tuple[int, ...] = ()
    arrays: tuple[Array, ...] = ()
    slices: int = 0


def program_work(program: Program, unknown_trips: float = 1) -> list[Work]:
    """Everything that runs. unknown_trips: of a loop whose length depends on data. Of the branches of a conditional
    the one with more bytes and products counts."""
    return _computation_work(program, program.entry, 1.0, unknown_trips)


def open_loops(program: Program) -> int:
    """How many loops there are whose length is not known."""
    loops = ((c, i) for c in program.computations.values() for i in c.instructions.values() if i.opcode == "while")
    return sum(math.isnan(_trips(program, computation, loop, math.nan)) for computation, loop in loops)


def _computation_work(program: Program, name: str, times: float, unknown_trips: float) -> list[Work]:
    computation, found = program.computations[name], []
    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        if opcode == "send" and (between := _between_slices(instruction, times)):
            found.append(between)
        if opcode in FREE or opcode.endswith("-done"):
            continue
        if opcode == "while":
            trips = times * _trips(program, computation, instruction, unknown_trips)
            for called in instruction.called():
                found += _computation_work(program, called, trips, unknown_trips)
        elif opcode == "conditional":
            branches = [_computation_work(program, called, times, unknown_trips) for called in instruction.called()]
            found += max(branches, key=lambda works: sum((w.flops + w.bytes) * w.times for w in works))
        elif opcode in ("call", "async-start"):
            for called in instruction.called():
                found += _computation_work(program, called, times, unknown_trips)
        elif opcode == "fusion":
            found += _fusion_work(program, computation, instruction, times)
        else:
            found.append(_instruction_work(computation, instruction, times))
    return found


def _trips(program: Program, computation: Computation, loop: Instruction, unknown: float) -> float:
    """How often a loop runs: as the compiler says, or as a condition does that compares a counter with a number."""
    said = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if said:
        return float(said[1])
    condition = program.computations[re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]]
    root = condition.root
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return unknown
    counter, limit = (condition.instructions[name] for name in root.operands)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return unknown
    begin = computation.instructions[loop.operands[0]]
    if begin.opcode == "tuple":
        place = int(re.search(r"index=(\d+)", counter.attributes)[1])
        begin = computation.instructions[begin.operands[place]]
    while begin.opcode in ("copy", "bitcast"):
        begin = computation.instructions[begin.operands[0]]
    return float(limit.operands[0]) - (float(begin.operands[0]) if begin.opcode == "constant" else 0.0)


def _instruction_work(computation: Computation, instruction: Instruction, times: float) -> Work:
    """Of an instruction that calls nothing."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        return _collective_work(computation, kind, instruction, times)
    if kind == "custom-call" and "tpu_custom_call" in instruction.attributes:
        arrays = tuple(a for name in instruction.operands for a in computation.instructions[name].arrays)
        moved = sum(a.bytes for a in arrays if a.in_hbm) + instruction.hbm_bytes
        return Work("kernel", instruction.source, 0.0, moved, times, arrays=arrays)
    flops = product_flops(computation, instruction) + cudnn_flops(instruction)
    return Work("compute", instruction.source, flops, _moved(computation, instruction), times)


def _collective_work(computation: Computation, kind: str, instruction: Instruction, times: float) -> Work:
    moved = collective_bytes(computation, instruction)
    return Work(kind, instruction.source, 0.0, moved, times, partition_group(instruction.attributes))


def _between_slices(instruction: Instruction, times: float) -> Work | None:
    """The collective between slices that a send begins: libtpu hands these to the host. Raises ValueError."""
    said = instruction.attributes
    if "xla_megascale_runtime" not in said:
        return None
    transfer = re.search(r'megascale_transfer_type="(\w+)"', said)
    if not transfer or transfer[1] not in _TRANSFERS:
        raise ValueError(f"unknown transfer between slices: {said[:80]}")
    kind, slices = _TRANSFERS[transfer[1]], _slices(said.partition("megascale_target=")[2])
    moved = instruction.arrays[0].bytes * (slices if kind == "all-gather" else 1)
    return Work(kind, instruction.source, 0.0, moved, times, slices=slices)


def _slices(target: str) -> int:
    """Between how many slices a transfer runs. target: the slices and the chips of each of them, "{1,2}x{0:3}", or all
    groups or pairs of chips, a chip's number being 100000 times its slice's and its own, {{100000->200000},...}."""
    if quoted := re.match(r'"\{([\d,:]+)\}', target):
        ends = [part.split(":") for part in quoted[1].split(",")]  # numbers, or ranges with both ends
        return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
    if listed := re.match(r"\{\{([\d,>-]+)\}", target):
        return len({int(chip) // 100_000 for chip in re.findall(r"\d+", listed[1])})
    raise ValueError(f"unknown target of a transfer between slices: {target[:80]}")


def _fusion_work(program: Program, computation: Computation, instruction: Instruction, times: float) -> list[Work]:
    (name,) = instruction.called()
    inner = program.computations[name]
    flops, collectives = 0.0, []
    for where, each in _inside(program, inner):
        kind = each.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            # XLA fuses an all-reduce with the slice that is kept of it, and runs a reduce-scatter.
            kind = "reduce-scatter" if "all-reduce-scatter" in name else kind
            collectives.append(_collective_work(where, kind, each, times))
        flops += product_flops(where, each)
    if collectives and not flops:
        return collectives
    operands = (computation.instructions[operand] for operand in instruction.operands)
    moved = sum(_read(program, inner, number, operand) for number, operand in enumerate(operands))
    moved += _written(inner, instruction)
    return [*collectives, Work("compute", instruction.source, flops, moved, times)]


def _inside(program: Program, computation: Computation) -> Iterator[tuple[Computation, Instruction]]:
    for instruction in computation.instructions.values():
        if instruction.opcode == "fusion":
            yield from _inside(program, program.computations[instruction.called()[0]])
        else:
            yield computation, instruction


def _read(program: Program, inner: Computation, number: int, operand: Instruction) -> float:
    """What a fusion reads of an operand: slices where it only takes slices (a layer of a stack)."""
    whole = operand.hbm_bytes
    parameter = inner.parameters.get(number)
    if parameter is None or not whole:
        return whole
    total, pending = 0.0, [parameter]
    while pending:
        current = pending.pop()
        for user in inner.users.get(current.name, ()):
            if user.opcode in ("bitcast", "reshape"):
                pending.append(user)
            elif user.opcode in SLICING and user.operands[0] == current.name:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == current.name:
                continue  # in place
            elif user.opcode == "fusion":
                nested = program.computations[user.called()[0]]
                numbers = (n for n, o in enumerate(user.operands) if o == current.name)
                total += sum(_read(program, nested, n, operand) for n in numbers)
            else:
                return whole
    return min(whole, total)


def _written(inner: Computation, instruction: Instruction) -> float:
    """What a fusion writes: of an update in place only the updated part."""
    root = inner.root
    outputs = [inner.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for output, array in zip(outputs, instruction.arrays, strict=False):
        while output.opcode == "bitcast":
            output = inner.instructions[output.operands[0]]
        if output.opcode == "dynamic-update-slice":
            total += sum(a.bytes for a in inner.instructions[output.operands[1]].arrays)
        elif array.in_hbm:
            total += array.bytes
    return total


def _moved(computation: Computation, instruction: Instruction) -> float:
    """What an instruction that is not fused reads and writes."""
    if instruction.opcode in SLICING:
        return 2.0 * instruction.hbm_bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * computation.instructions[instruction.operands[1]].hbm_bytes
    operands = {name for name in instruction.operands if name in computation.instructions}
    return sum(computation.instructions[name].hbm_bytes for name in operands) + instruction.hbm_bytes
