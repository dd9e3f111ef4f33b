"""What one operation costs: matrix FLOPs, and the bytes it moves in each memory.

The conventions are those of XLA's own HloCostAnalysis, which counts every loop body once: taps of a
convolution that fall into padding or between dilated elements cost nothing; a fusion reads its
operands and writes its results, and what happens inside it stays on the chip; of an array that is
only sliced, or updated in place, the slice alone is touched. Only bytes of arrays that live in the
memory in question count, each as stored, padding to whole tiles included.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from internvl_jax.plan.hlo import HBM, HOST, Computation, HloError, Module, Op, Shape

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# These move nothing by themselves.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "optimization-barrier",
    "copy-done",
    "async-update",
    "async-done",
    "send-done",
    "recv-done",
    "domain",
}
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "Sharding", "AsyncCollectiveStart"}
_ALIAS = {"bitcast", "get-tuple-element", "opt-barrier", "optimization-barrier"}
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes read and written in the chip's memory and in the host's."""

    hbm: int = 0
    host: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.hbm + other.hbm, self.host + other.host)


def collective(op: Op) -> str | None:
    """Kind of collective that an operation starts or is: "all-gather", ...; None for others."""
    kind = op.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def target(op: Op) -> str:
    """What a custom call calls."""
    found = re.search(r'custom_call_target="([^"]*)"', op.attributes)
    return found[1] if found else ""


def inside(module: Module, op: Op) -> Iterable[tuple[Op, Computation]]:
    """All operations of a fusion, those of fusions within it included."""
    body = module.fused(op)
    for inner in body.ops:
        if inner.opcode == "fusion":
            yield from inside(module, inner)
        else:
            yield inner, body


# ---- FLOPs


def matrix_flops(module: Module, computation: Computation, op: Op) -> float:
    """FLOPs of the matrix unit: dots and convolutions, in fusions as well; 2 a multiply-add.

    Args:
        computation: the one that holds `op`.
    """
    if op.opcode == "fusion":
        return sum(matrix_flops(module, body, inner) for inner, body in inside(module, op))
    if op.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (operand.shapes[0].dims for operand in computation.operands(op)[:2])
    out = op.shapes[0].dims
    if op.opcode == "dot":
        contracted = math.prod(left[d] for d in op.integers("lhs_contracting_dims"))
        return 2.0 * math.prod(out) * contracted
    return _convolution_flops(op, left, right, out)


def _convolution_flops(op: Op, left: tuple, right: tuple, out: tuple) -> float:
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", op.attribute("dim_labels") or "")
    if labels is None:
        raise HloError(f"Convolution {op.name} names no dimensions: {op.attributes[:120]!r}")
    lhs, rhs, result = (
        dict(zip(text, dims)) for text, dims in zip(labels.groups(), (left, right, out))
    )
    window = dict(
        field.split("=") for field in (op.attribute("window") or "").split() if "=" in field
    )
    taps = 1
    for i, size in enumerate(window["size"].split("x") if "size" in window else ()):
        field = lambda name, default, i=i: window[name].split("x")[i] if name in window else default
        taps *= _taps(
            size=int(size),
            out=result[str(i)],
            width=lhs[str(i)],
            low=int(field("pad", "0_0").split("_")[0]),
            stride=int(field("stride", "1")),
            left_dilation=int(field("lhs_dilate", "1")),
            right_dilation=int(field("rhs_dilate", "1")),
        )
    groups = int(op.attribute("feature_group_count") or 1)
    batches = int(op.attribute("batch_group_count") or 1)
    return 2.0 * (lhs["f"] // groups) * rhs["o"] * (lhs["b"] // batches) * taps


@functools.cache
def _taps(
    size: int, out: int, width: int, low: int, stride: int, left_dilation: int, right_dilation: int
) -> int:
    """Pairs of output position and kernel position, along one dimension, that meet an element."""
    place = np.arange(out)[:, None] * stride + np.arange(size) * right_dilation - low
    valid = (place >= 0) & (place <= (width - 1) * left_dilation) & (place % left_dilation == 0)
    return int(np.count_nonzero(valid))


# ---- bytes


def traffic(module: Module, computation: Computation, op: Op) -> Traffic:
    """Bytes that one execution of an operation reads and writes.

    Loops, branches, calls and asynchronous wrappers are nothing by themselves; what they run is.
    Collectives move bytes between chips, which are counted elsewhere.
    """
    if op.opcode in _FREE or collective(op) or op.opcode.endswith("-done"):
        return Traffic()
    if op.opcode in ("while", "conditional", "call", "async-start"):
        return Traffic()
    if op.opcode == "custom-call" and (
        target(op) in _FREE_TARGETS or op.called("called_computations")
    ):
        return Traffic()
    if op.opcode == "copy-start":
        return _in_memory((s, s.stored_bytes) for s in op.shapes[:2])
    operands = computation.operands(op)
    if op.opcode == "fusion":
        body = module.fused(op)
        moved = [
            (
                shape,
                _read(module, _Fused(body), body.parameters[i])
                if len(operand.shapes) == 1
                else shape.stored_bytes,
            )
            for i, operand in enumerate(operands)
            for shape in operand.shapes
        ]
        # The top level knows the memory an array lives in; the inside, how much of it is written.
        moved += zip(op.shapes, _written(module, body, body.root))
        return _in_memory(moved)
    if op.opcode in _SLICES:
        result = op.shapes[0]
        indices = [(s.shapes[0], s.shapes[0].stored_bytes) for s in operands[1:]]
        indices = indices if op.opcode == "gather" else []
        return _in_memory(
            [(result, result.stored_bytes), (operands[0].shapes[0], result.stored_bytes), *indices]
        )
    if op.opcode == "dynamic-update-slice":
        result, update = op.shapes[0], operands[1].shapes[0]
        return _in_memory([(update, update.stored_bytes), (result, update.stored_bytes)])
    if op.opcode == "scatter":
        indices, update = operands[1].shapes[0], operands[2].shapes[0]
        moved = [(indices, indices.stored_bytes), (update, update.stored_bytes)]
        return _in_memory([*moved, (op.shapes[0], 2 * update.stored_bytes)])
    shapes = [shape for operand in operands for shape in operand.shapes] + list(op.shapes)
    return _in_memory((shape, shape.stored_bytes) for shape in shapes)


def _in_memory(moved: Iterable[tuple[Shape, int]]) -> Traffic:
    hbm = host = 0
    for shape, size in moved:
        hbm += size if shape.space == HBM else 0
        host += size if shape.space == HOST else 0
    return Traffic(hbm, host)


@dataclasses.dataclass(frozen=True)
class _Fused:
    """A computation inside a fusion, and the fusion operation's own place."""

    body: Computation
    outer: tuple[_Fused, Op] | None = None


def _read(module: Module, place: _Fused, op: Op) -> int:
    """Bytes of a fusion's parameter, or of a view of it, that the fusion reads."""
    whole = sum(shape.stored_bytes for shape in op.shapes)
    total = 0
    if op is place.body.root and place.outer is not None:  # a nested fusion hands it on
        total += _read(module, *place.outer)
    for user, position in place.body.users.get(op.name, ()):
        if user.opcode in _SLICES and position == 0:
            total += user.shapes[0].stored_bytes
        elif user.opcode == "dynamic-update-slice" and position == 0:
            total += 0  # in place: what is overwritten is not read
        elif user.opcode == "scatter" and position == 0:
            total += place.body.operands(user)[2].shapes[0].stored_bytes
        elif user.opcode in _ALIAS:
            total += _read(module, place, user)
        elif user.opcode == "fusion":
            inner = module.fused(user)
            total += _read(module, _Fused(inner, (place, user)), inner.parameters[position])
        elif user.opcode == "tuple" or collective(user) or _asynchronous(user):
            total += 0  # handed on in place, or read by the network
        else:
            return whole
    return min(total, whole)


def _asynchronous(op: Op) -> bool:
    return target(op).startswith("AsyncCollective")


def _written(module: Module, body: Computation, op: Op) -> list[int]:
    """Bytes that a fusion writes of each array of its result."""
    if op.opcode == "tuple":
        return [size for operand in body.operands(op) for size in _written(module, body, operand)]
    if op.opcode == "bitcast":
        return _written(module, body, body.operands(op)[0])
    if op.opcode == "fusion":
        inner = module.fused(op)
        sizes = _written(module, inner, inner.root)
        base = _updated(module, inner, inner.root)
        if base is None:
            return sizes
        # An update in place of something made within this fusion writes all of it.
        made = _origin(body, body.operands(op)[int(base.literal)])
        return sizes if made.opcode == "parameter" else [s.stored_bytes for s in op.shapes]
    if op.opcode in ("dynamic-update-slice", "scatter"):
        operands = body.operands(op)
        if _updated(module, body, op) is None:
            return [op.shapes[0].stored_bytes]
        return [operands[1 if op.opcode == "dynamic-update-slice" else 2].shapes[0].stored_bytes]
    if op.opcode == "parameter" or collective(op) or _asynchronous(op):
        return [0] * len(op.shapes)  # handed on in place, or written by the network
    return [shape.stored_bytes for shape in op.shapes]


def _updated(module: Module, body: Computation, op: Op) -> Op | None:
    """The parameter that a result is an update of, in place; None where it is no such thing."""
    if op.opcode == "bitcast":
        return _updated(module, body, body.operands(op)[0])
    if op.opcode == "fusion":
        inner = module.fused(op)
        base = _updated(module, inner, inner.root)
        origin = None if base is None else _origin(body, body.operands(op)[int(base.literal)])
    elif op.opcode in ("dynamic-update-slice", "scatter"):
        origin = _origin(body, body.operands(op)[0])
        if origin.opcode != "parameter":  # an update of an update, as in a chain of them
            return _updated(module, body, origin)
    else:
        return None
    return origin if origin is not None and origin.opcode == "parameter" else None


def _origin(body: Computation, op: Op) -> Op:
    """What a chain of views leads back to."""
    while op.opcode in ("bitcast", "get-tuple-element"):
        op = body.operands(op)[0]
    return op
