"""Reads the text of a compiled program: its computations, their instructions and the arrays these make."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
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
class Program:
    computations: dict[str, Computation]
    entry: str


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
