"""Reads the text of a compiled program: which instructions run how often, and what each of them moves and multiplies.

XLA's own cost analysis counts the body of a loop once. Here a loop counts as often as it runs, so that scanned layers
and chunks count in full.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
FREE = frozenset(
    """
    parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id add-dependency opt-barrier
    domain async-done async-update copy-done send recv send-done recv-done
    """.split()
)
SLICING = ("dynamic-slice", "slice", "gather")

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_PARTS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")  # an axis of a mesh, or a part of one
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Array:
    """Attributes:
    dtype: as HLO writes it
    shape: sizes
    in_hbm: not in a memory of the core
    """

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        return BYTES.get(self.dtype, 0) * math.prod(self.shape)


@dataclass(frozen=True)
class Instruction:
    """One line: `name = arrays opcode(operands), attributes`."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self) -> list[str]:
        """The computations it names."""
        found = re.findall(
            r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)", self.attributes
        )
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        return found + (_NAME.findall(branches[1]) if branches else [])

    @property
    def source(self) -> str:
        """Where in the JAX program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else self.name

    @property
    def hbm_bytes(self) -> int:
        return sum(array.bytes for array in self.arrays if array.in_hbm)


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions.values()) if i.is_root)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.operands[0]): i for i in found}


@dataclass(frozen=True)
class Work:
    """What one instruction does each time it runs, on one chip.

    Attributes:
      kind: "compute", "kernel" (a Pallas kernel) or the name of a collective
      source: where in the JAX program it comes from
      flops: of matrix products; not counted for kernels
      bytes: to and from the chip's memory; for a collective of its largest array
      times: how often it runs
      group: of a collective, the partitions that take part in it with partition 0's
      arrays: of a kernel, its operands
    """

    kind: str
    source: str
    flops: float
    bytes: float
    times: float
    group: tuple[int, ...] = ()
    arrays: tuple[Array, ...] = ()


@dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: str

    def work(self, unknown_trips: float = 1) -> Iterator[Work]:
        """Everything that runs. unknown_trips: of a loop whose length depends on data. Of the branches of a conditional
        the one with more bytes and products counts."""
        return iter(self._work(self.entry, 1.0, unknown_trips))

    @property
    def open_loops(self) -> int:
        """How many loops there are whose length is not known."""
        loops = ((c, i) for c in self.computations.values() for i in c.instructions.values() if i.opcode == "while")
        return sum(math.isnan(self._trips(computation, loop, math.nan)) for computation, loop in loops)

    def _work(self, name: str, times: float, unknown_trips: float) -> list[Work]:
        computation, found = self.computations[name], []
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode in FREE or opcode.endswith("-done"):
                continue
            if opcode == "while":
                trips = times * self._trips(computation, instruction, unknown_trips)
                for called in instruction.called():
                    found += self._work(called, trips, unknown_trips)
            elif opcode == "conditional":
                branches = [self._work(called, times, unknown_trips) for called in instruction.called()]
                found += max(branches, key=lambda works: sum((w.flops + w.bytes) * w.times for w in works))
            elif opcode in ("call", "async-start"):
                for called in instruction.called():
                    found += self._work(called, times, unknown_trips)
            else:
                found += self._of(computation, instruction, times)
        return found

    def _trips(self, computation: Computation, loop: Instruction, unknown: float) -> float:
        """How often a loop runs: as the compiler says, or as a condition does that compares a counter with a number."""
        said = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if said:
            return float(said[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]]
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

    def _of(self, computation: Computation, instruction: Instruction, times: float) -> list[Work]:
        """The work of an instruction that calls nothing, or of a fusion."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return [_collective(computation, kind, instruction, times)]
        if kind == "fusion":
            return self._fusion(computation, instruction, times)
        if kind == "custom-call" and "tpu_custom_call" in instruction.attributes:
            arrays = tuple(a for name in instruction.operands for a in computation.instructions[name].arrays)
            moved = sum(a.bytes for a in arrays if a.in_hbm) + instruction.hbm_bytes
            return [Work("kernel", instruction.source, 0.0, moved, times, arrays=arrays)]
        flops = _product_flops(computation, instruction) + _cudnn_flops(instruction)
        return [Work("compute", instruction.source, flops, self._bytes(computation, instruction), times)]

    def _fusion(self, computation: Computation, instruction: Instruction, times: float) -> list[Work]:
        (name,) = instruction.called()
        inner = self.computations[name]
        flops, collectives = 0.0, []
        for each in self._inside(inner):
            kind = each[1].opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                # XLA fuses an all-reduce with the slice that is kept of it, and runs a reduce-scatter.
                kind = "reduce-scatter" if "all-reduce-scatter" in name else kind
                collectives.append(_collective(each[0], kind, each[1], times))
            flops += _product_flops(*each)
        if collectives and not flops:
            return collectives
        moved = sum(
            self._read(inner, number, computation.instructions[operand])
            for number, operand in enumerate(instruction.operands)
        )
        moved += self._written(inner, instruction)
        return [*collectives, Work("compute", instruction.source, flops, moved, times)]

    def _inside(self, computation: Computation) -> Iterator[tuple[Computation, Instruction]]:
        for instruction in computation.instructions.values():
            if instruction.opcode == "fusion":
                yield from self._inside(self.computations[instruction.called()[0]])
            else:
                yield computation, instruction

    def _read(self, inner: Computation, number: int, operand: Instruction) -> float:
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
                    nested = self.computations[user.called()[0]]
                    total += sum(
                        self._read(nested, n, operand) for n, o in enumerate(user.operands) if o == current.name
                    )
                else:
                    return whole
        return min(whole, total)

    def _written(self, inner: Computation, instruction: Instruction) -> float:
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

    def _bytes(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.opcode in SLICING:
            return 2.0 * instruction.hbm_bytes
        if instruction.opcode == "dynamic-update-slice":
            return 2.0 * computation.instructions[instruction.operands[1]].hbm_bytes
        operands = {name for name in instruction.operands if name in computation.instructions}
        return sum(computation.instructions[name].hbm_bytes for name in operands) + instruction.hbm_bytes


def parse(text: str) -> Program:
    """The program that `jax.stages.Compiled.as_text` wrote."""
    computations, entry, name, lines = {}, None, None, []
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header:
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif line == "}":
            instructions = (_instruction(line) for line in lines)
            computations[name] = Computation(name, {each.name: each for each in instructions})
            name = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        else:
            lines[-1] += line  # Pallas kernels carry attributes of several lines, some of which begin with a brace
    return Program(computations, entry)


def largest_arrays(text: str, count: int) -> list[tuple[str, int]]:
    """The largest arrays that a program's text mentions, like ("f32[8,128]", 4096), each once."""
    sizes = {f"{array.dtype}[{','.join(map(str, array.shape))}]": array.bytes for array in _arrays(text)}
    return sorted(sizes.items(), key=lambda pair: -pair[1])[:count]


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(map(int, sizes.split(","))) if sizes else (), "S(" not in layout)
        for dtype, sizes, layout in _ARRAY.findall(text)
    )


def _instruction(line: str) -> Instruction:
    start = _INSTRUCTION.match(line)
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    opcode, inside = rest[:opening], rest[opening + 1 : closing]
    operands = (inside,) if opcode in ("parameter", "constant") else tuple(_NAME.findall(inside))
    return Instruction(start[2], opcode, _arrays(shape), operands, rest[closing + 1 :], bool(start[1]))


def _closing(text: str, opening: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _collective(computation: Computation, kind: str, instruction: Instruction, times: float) -> Work:
    arrays, count = instruction.arrays, len(instruction.operands)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":  # the operands, the results and, perhaps, flags
        arrays = max(arrays[:count], arrays[count : 2 * count], key=_total_bytes)
    elif instruction.opcode == "reduce-scatter":  # its results are parts of what is reduced
        arrays = tuple(array for name in instruction.operands for array in computation.instructions[name].arrays)
    return Work(kind, instruction.source, 0.0, _total_bytes(arrays), times, _group(instruction.attributes))


def _total_bytes(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays)


def _group(attributes: str) -> tuple[int, ...]:
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


def _product_flops(computation: Computation, instruction: Instruction) -> float:
    """Of a dot or a convolution (TPU programs write every matrix product as one)."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (computation.instructions[name].arrays[0].shape for name in instruction.operands[:2])
    output = instruction.arrays[0].shape
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
        return 2.0 * math.prod(output) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left_labels, right_labels, output_labels = labels.groups()
    flops = 2.0 * output[output_labels.index("b")] * output[output_labels.index("f")] * right[right_labels.index("i")]
    window = dict(
        re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.attributes) or ("", ""))[1])
    )
    spatial = [label for label in output_labels if label.isdigit()]
    for number in sorted(spatial):
        axis = int(number)
        settings = {key: value.split("x")[axis] for key, value in window.items()}
        low = int(settings.get("pad", "0_0").split("_")[0])
        flops *= _pairs(
            output[output_labels.index(number)],
            right[right_labels.index(number)],
            left[left_labels.index(number)],
            int(settings.get("stride", 1)),
            low,
            int(settings.get("lhs_dilate", 1)),
            int(settings.get("rhs_dilate", 1)),
        )
    return flops


def _cudnn_flops(instruction: Instruction) -> float:
    """Of cuDNN's attention, which names the shape [N, H, S, T] of its scores: two products forward, five backward."""
    target = re.search(r'custom_call_target="__cudnn\$fmha(\w+)"', instruction.attributes)
    if target is None:
        return 0.0
    scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions": ?\[([^]]*)\]', instruction.attributes)[1]
    products = 5 if target[1].endswith("Backward") else 2
    seen = 0.5 if re.search(r'"mask_type": ?"CAUSAL"', instruction.attributes) else 1.0
    width = instruction.arrays[0].shape[-1]
    return 2.0 * products * seen * width * math.prod(int(size) for size in re.findall(r"\d+", scores))


@cache
def _pairs(
    outputs: int, kernel: int, inputs: int, stride: int, low: int, left_dilation: int, right_dilation: int
) -> int:
    """How many pairs of an output and a kernel place meet a real input, along one spatial axis.

    TPU programs write batch axes as spatial ones in which each output meets one place.
    """
    positions = np.arange(outputs) * stride - low
    total = 0
    for place in range(kernel):
        at = positions + place * right_dilation
        total += int(((at >= 0) & (at % left_dilation == 0) & (at < inputs * left_dilation)).sum())
    return total
