"""Reads the text of a compiled program: its computations and their operations.

XLA writes a scheduled module as text, one operation a line, in the order of execution. How often
its loops run is the business of `trips.py`, what an operation costs that of `cost.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

HBM, VMEM, HOST = 0, 1, 5  # memory spaces S(n) of a TPU layout; others hold flags and scalars

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (?=[(\w])")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_END = re.compile(r"\n\}(, [^\n]*)?\s*\Z")
_COMMENT = re.compile(r"/\*index=\d+\*/")


class HloError(ValueError):
    """A module's text says something that this reader does not understand."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an operation's result.

    Attributes:
        dtype: as in the text: bf16, f32, s32, pred.
        dims: logical sizes.
        order: dimensions from the fastest varying on; empty where the text names no layout.
        tiles: tile sizes of the layout, outermost first.
        space: memory space: `HBM`, `VMEM`, `HOST` or another.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    space: int = HBM

    @property
    def bits(self) -> int:
        if self.dtype in _BITS:
            return _BITS[self.dtype]
        found = re.match(r"[a-z]+(\d+)", self.dtype)  # s32, bf16, f8e4m3fn
        if not found:
            raise HloError(f"The size of an element of type {self.dtype!r} is not known.")
        return int(found[1])

    @property
    def bytes(self) -> int:
        """Size of the elements."""
        return math.prod(self.dims) * self.bits // 8

    @property
    def stored_bytes(self) -> int:
        """Size in memory: the minor dimensions are padded to whole tiles."""
        if not self.tiles or not self.order:
            return self.bytes
        tile = self.tiles[0]
        sizes = [self.dims[d] for d in reversed(self.order)]
        sizes = [1] * (len(tile) - len(sizes)) + sizes
        for i in range(1, len(tile) + 1):
            sizes[-i] = -(-sizes[-i] // tile[-i]) * tile[-i]
        return math.prod(sizes) * self.bits // 8


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation as the text states it.

    Attributes:
        name: unique within its computation.
        opcode: `fusion`, `while`, `convolution`, ...
        type: text of the result type.
        operands: names within the same computation.
        literal: text between the parentheses: a constant's value, a parameter's number.
        attributes: everything behind them.
    """

    name: str
    opcode: str
    type: str = dataclasses.field(repr=False)
    operands: tuple[str, ...]
    literal: str = dataclasses.field(repr=False)
    attributes: str = dataclasses.field(repr=False)

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Arrays of the result; a tuple's in order, however nested."""
        return tuple(_shape(*found) for found in _SHAPE.findall(self.type))

    def attribute(self, name: str) -> str | None:
        """Value of `name=value` up to the next comma; a `{...}` value without the outer braces."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        if found is None:
            return None
        rest = self.attributes[found.end() :]
        if rest.startswith("{"):
            return rest[1 : _closing(rest, 0, "{}")]
        return re.match(r"[^,\s]*", rest)[0]

    def called(self, *roles: str) -> tuple[str, ...]:
        """Names of the computations that the attributes in `roles` name."""
        names: list[str] = []
        for role in roles:
            names += re.findall(r"[\w.\-]+", self.attribute(role) or "")
        return tuple(names)

    def integers(self, name: str) -> tuple[int, ...]:
        """Integers of an attribute such as `dimensions={0,1}`; empty where it is missing."""
        return tuple(int(i) for i in re.findall(r"\d+", self.attribute(name) or ""))

    @property
    def op_name(self) -> str:
        """Where in the traced program the operation came from; empty where the text is silent."""
        found = re.search(r'metadata=\{[^}]*?op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    @property
    def frame(self) -> int:
        """Number of the stack frame that traced it, 0 for none."""
        found = re.search(r"metadata=\{.*?stack_frame_id=(\d+)", self.attributes)
        return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True)
class Computation:
    """Operations in the order of the text, which is the schedule in a scheduled module."""

    name: str
    ops: tuple[Op, ...] = dataclasses.field(repr=False)
    root: Op = dataclasses.field(repr=False)

    @functools.cached_property
    def by_name(self) -> Mapping[str, Op]:
        return {op.name: op for op in self.ops}

    @functools.cached_property
    def parameters(self) -> Mapping[int, Op]:
        return {int(op.literal): op for op in self.ops if op.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[tuple[Op, int], ...]]:
        """Operations that read a result, and as which operand."""
        users: dict[str, list[tuple[Op, int]]] = {}
        for op in self.ops:
            for position, operand in enumerate(op.operands):
                users.setdefault(operand, []).append((op, position))
        return {name: tuple(found) for name, found in users.items()}

    def operands(self, op: Op) -> tuple[Op, ...]:
        return tuple(self.by_name[name] for name in op.operands)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
        name: of the jitted function.
        computations: by name.
        entry: where execution starts.
        partitions: devices that run it together.
        sources: of every stack frame that the text names, the function and its caller:
            "dense (dense.py:24) < Mlp.__call__ (mlp.py:48)".
    """

    name: str
    computations: Mapping[str, Computation] = dataclasses.field(repr=False)
    entry: Computation
    partitions: int
    sources: Mapping[int, str] = dataclasses.field(repr=False)

    def computation(self, name: str) -> Computation:
        return self.computations[name]

    def fused(self, op: Op) -> Computation:
        """What a fusion or a call runs."""
        return self.computation(op.called("calls", "to_apply")[0])


def parse(text: str) -> Module:
    """Module of an HLO text dump, `*.after_optimizations.txt` of `xla_dump_hlo_as_text`.

    Raises:
        HloError: no entry computation, or an operation that cannot be read.
    """
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    lines = text.split("\n")
    for line in lines:
        header = _HEADER.match(line)
        if header:
            current = bodies.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and _OPERATION.match(line):
            current.append(line)
        elif current:
            # The metadata of Pallas kernels holds raw newlines and "}}": any other line belongs
            # to the operation before it, a computation's own "}" too until `_computation`.
            current[-1] += "\n" + line
    if not entry:
        raise HloError("The text has no ENTRY computation: is it an HLO module's dump?")
    computations = {name: _computation(name, body) for name, body in bodies.items()}
    partitions = re.search(r"num_partitions=(\d+)", lines[0])
    name = re.match(r"HloModule ([^\s,]+)", lines[0])
    return Module(
        name=name[1] if name else "",
        computations=computations,
        entry=computations[entry],
        partitions=int(partitions[1]) if partitions else 1,
        sources=_sources(text),
    )


# ---- the text


def _closing(text: str, start: int, pair: str) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == pair[0]:
            depth += 1
        elif text[i] == pair[1]:
            depth -= 1
            if depth == 0:
                return i
    raise HloError(f"A {pair[0]!r} is never closed: {text[start : start + 80]!r}")


def _computation(name: str, lines: list[str]) -> Computation:
    lines[-1:] = [_END.sub("", line) for line in lines[-1:]]
    ops = [_operation(line) for line in lines]
    root = next((op for op, line in zip(ops, lines) if line.lstrip().startswith("ROOT ")), None)
    if root is None:
        raise HloError(f"Computation {name} has no ROOT operation.")
    return Computation(name, tuple(_elements_named(ops)), root)


def _elements_named(ops: list[Op]) -> Iterator[Op]:
    """Writes out `%x#1`, a newer compiler's short form of element 1 of the tuple x."""
    known: dict[str, Op] = {}
    for op in ops:
        for operand in op.operands:
            parts = operand.split("#")
            for end in range(2, len(parts) + 1):
                name, whole = "#".join(parts[:end]), "#".join(parts[: end - 1])
                if name not in known:
                    index = int(parts[end - 1])
                    kind = _elements(known[whole].type)[index]
                    attributes = f", index={index}"
                    known[name] = Op(
                        name, "get-tuple-element", kind, (whole,), f"%{whole}", attributes
                    )
                    yield known[name]
        known[op.name] = op
        yield op


def _elements(kind: str) -> list[str]:
    """The types in a tuple's type."""
    found, depth, start = [], 0, 1
    for i, c in enumerate(kind):
        depth += (c in "([{") - (c in ")]}")
        if (c == "," and depth == 1) or (c == ")" and depth == 0):
            found.append(kind[start:i].strip())
            start = i + 1
    return found


def _operation(line: str) -> Op:
    head = _OPERATION.match(line)
    rest = _COMMENT.sub("", line[head.end() :])
    end = _closing(rest, 0, "()") + 1 if rest.startswith("(") else rest.index(" ")
    opcode = re.compile(r"\s*([\w\-]+)\(").match(rest, end)
    if opcode is None:
        raise HloError(f"No operation in the line {line[:120]!r}.")
    close = _closing(rest, opcode.end() - 1, "()")
    literal = rest[opcode.end() : close]
    return Op(
        name=head[2],
        opcode=opcode[1],
        type=rest[:end],
        operands=tuple(re.findall(r"%([\w.\-]+(?:#\d+)*)", literal)),
        literal=literal,
        attributes=rest[close + 1 :],
    )


@functools.cache
def _shape(dtype: str, dims: str, layout: str) -> Shape:
    order, _, rest = layout.partition(":")
    tiles = re.match(r"T((?:\([\d,*]*\))+)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Shape(
        dtype=dtype,
        dims=tuple(int(d) for d in re.findall(r"\d+", dims)),
        order=tuple(int(d) for d in order.split(",") if d),
        tiles=tuple(
            tuple(int(t) for t in tile.split(",") if t.isdigit())
            for tile in re.findall(r"\(([\d,*]*)\)", tiles[1] if tiles else "")
        ),
        space=int(space[1]) if space else HBM,
    )


def _sources(text: str) -> dict[int, str]:
    """The tables at the head of the text, joined: stack frame -> function and caller."""
    files, functions = (
        dict(re.findall(r'^(\d+) "(.*)"$', _table(text, name), re.MULTILINE))
        for name in ("FileNames", "FunctionNames")
    )
    locations = {}
    for i, file, function, line in re.findall(
        r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)",
        _table(text, "FileLocations"),
        re.MULTILINE,
    ):
        path = files.get(file, "?").rsplit("/")[-1]
        locations[i] = f"{functions.get(function, '?')} ({path}:{line})"
    frames = {
        int(frame): (locations.get(location, "?"), int(parent or 1) - 1)  # 1: none, 2: frame 1
        for frame, location, parent in re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?",
            _table(text, "StackFrames"),
            re.MULTILINE,
        )
    }
    return {
        frame: f"{code} < {frames[parent][0]}" if parent in frames else code
        for frame, (code, parent) in frames.items()
    }


def _table(text: str, name: str) -> str:
    found = re.search(rf"^{name}\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""
