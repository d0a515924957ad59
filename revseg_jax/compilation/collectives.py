"""What a collective of a compiled program moves, and between which partitions."""

from __future__ import annotations

import math
import re

import numpy as np

from revseg_jax.compilation.hlo import Array, Computation, Instruction

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_PARTS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")  # an axis of a mesh, or a part of one


def collective_bytes(computation: Computation, instruction: Instruction) -> int:
    """Of the whole arrays on one chip: before a reduction, after a gathering."""
    opcode, arrays, count = instruction.opcode, instruction.arrays, len(instruction.operands)
    if opcode.endswith("-start") and opcode != "all-reduce-start":  # the operands, the results and, perhaps, flags
        return max(_total_bytes(arrays[:count]), _total_bytes(arrays[count : 2 * count]))
    if opcode == "reduce-scatter":  # its results are parts of what is reduced
        return sum(_total_bytes(computation.instructions[name].arrays) for name in instruction.operands)
    return _total_bytes(arrays)


def _total_bytes(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays)


def partition_group(attributes: str) -> tuple[int, ...]:
    """The first of the groups of partitions that work together; empty where all do. Raises ValueError."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return int(pairs[1]), int(pairs[2])
    text = attributes.partition("replica_groups=")[2]
    if not text or text.startswith("{}"):
        return ()
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return _integers(listed[1])
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, sizes, order = map(_integers, iota.groups(""))
        return tuple(_ordered(sizes, order).reshape(shape)[0].tolist())
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{([^}]*)\}", text):
        return _group_of_mesh(*mesh.groups(""))
    raise ValueError(f"unknown replica groups: {text[:80]}")


def _group_of_mesh(axes: str, sizes: str, order: str, grouped: str) -> tuple[int, ...]:
    """Of groups along the axes named in `grouped` of a mesh such as "'a'=2,'b'=4"; 'b':(2)2 is the part of 'b' of size
    2 that stands behind a part of size 2."""
    lengths = {name: int(length) for name, length in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = _ordered(_integers(sizes) or tuple(lengths.values()), _integers(order))
    parts = {name: (int(before or 1), int(part or lengths[name])) for name, before, part in _PARTS.findall(grouped)}
    shape, chosen = [], []
    for name, length in lengths.items():
        before, part = parts.get(name, (1, 1))
        shape += [before, part, length // before // part]
        chosen += [0, slice(None), 0]
    return tuple(ids.reshape(shape)[tuple(chosen)].ravel().tolist())


def _ordered(sizes: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    """The partitions' numbers in an array of these sizes, its axes then in this order."""
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order or range(len(sizes)))


def _integers(listed: str) -> tuple[int, ...]:
    return tuple(map(int, listed.split(","))) if listed else ()
