"""What a collective moves, and between whom.

Bytes per device are stated as is usual: an all-gather by its output, a reduce-scatter by its input,
an all-reduce by its array once (it moves it twice, which its time accounts for), an all-to-all and
a permutation by what they move. Elements count, padding does not.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from internvl_jax.plan.cost import collective
from internvl_jax.plan.hlo import Computation, HloError, Op

Groups = list[list[int]]

_MOVES = {"all-reduce": 2.0}  # times the bytes that it is stated by; 1 for all others


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective operation, once.

    Attributes:
        kind: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute, ...
        bytes: per device, by the module's convention.
        channel: what the parts of one collective share; 0 for none.
        within: devices of a group in one slice.
        slices: slices that a group spans.
    """

    kind: str
    bytes: int
    channel: int
    within: int
    slices: int

    @property
    def network(self) -> str:
        """`dcn` where a group spans slices, else `ici`."""
        return "dcn" if self.slices > 1 else "ici"

    def seconds(self, ici: float, dcn: float) -> float:
        """Estimate from bytes/s per device of both networks.

        Across slices, the devices of a group in one slice share the traffic between slices: each
        sends its part over the data-centre network, and the slice's own network spreads it.
        """
        moved = _MOVES.get(self.kind, 1.0) * self.bytes
        seconds = moved / ici if self.within > 1 else 0.0
        return seconds + (moved / (self.within * dcn) if self.slices > 1 else 0.0)


def transfer(computation: Computation, op: Op, devices: int, devices_per_slice: int) -> Transfer:
    """Reads a collective operation.

    Args:
        computation: the one that holds `op`.
        op: the collective, or the start of an asynchronous one.
        devices: of the whole program.
        devices_per_slice: ids below it are slice 0, and so on.
    """
    kind = collective(op)
    if kind is None:
        raise HloError(f"{op.opcode} {op.name} is no collective.")
    read = [shape for operand in computation.operands(op) for shape in operand.shapes]
    if kind == "all-gather":
        # An asynchronous one repeats its operands before its results.
        shapes = op.shapes[len(read) : 2 * len(read)] if op.opcode.endswith("-start") else op.shapes
    else:
        shapes = read
    # A transfer belongs to the slowest group, which is the one that spans most slices.
    spans = [{i // devices_per_slice for i in group} for group in groups(op, devices)]
    widest = max(range(len(spans)), key=lambda i: len(spans[i]))
    members = groups(op, devices)[widest]
    return Transfer(
        kind=kind,
        bytes=sum(shape.bytes for shape in shapes),
        channel=int(op.attribute("channel_id") or 0),
        within=max(len(members) // len(spans[widest]), 1),
        slices=len(spans[widest]),
    )


def between_slices(op: Op) -> tuple[str, Transfer] | None:
    """Reads the `send` of a collective between slices, which the program hands to its runtime.

    With several slices, the compiler divides a collective that crosses them: the part within a
    slice is an ordinary one, the rest goes over the data-centre network as a pair of `send` and
    `recv` of the same rendezvous.

    Returns:
        The rendezvous and what is moved; None for another `send` or `recv`.
    """
    found = dict(re.findall(r'_xla_(\w+)="([^"]*)"', op.attributes))
    kind, meeting = found.get("megascale_transfer_type"), found.get("host_transfer_rendezvous")
    if kind is None or meeting is None:
        return None
    moved = Transfer(
        kind=kind.lower().replace("_", "-"),
        bytes=op.shapes[0].bytes,
        channel=int(op.attribute("channel_id") or 0),
        within=1,
        slices=2,  # at least; how many more makes no difference to the estimate
    )
    return meeting, moved


def groups(op: Op, devices: int) -> Groups:
    """Devices that exchange with each other, as global ids.

    Raises:
        HloError: replica groups in a notation that is not known.
    """
    pairs = op.attribute("source_target_pairs")
    if pairs is not None:
        found = re.findall(r"\{(\d+),(\d+)\}", pairs)
        return [[int(a), int(b)] for a, b in found if a != b] or [[0]]
    start = op.attributes.find("replica_groups=")
    text = op.attributes[start + len("replica_groups=") :] if start >= 0 else "{}"
    if text.startswith("{"):
        explicit = re.match(r"\{((?:\{[\d,]*\},?)*)\}", text)
        found = re.findall(r"\{([\d,]+)\}", explicit[1]) if explicit else []
        return [[int(i) for i in group.split(",")] for group in found] or [list(range(devices))]
    if text.startswith("mesh["):
        return _mesh_groups(text)
    iota = re.match(r"\[([\d,]+)\]" + _IOTA, text)
    if iota is None:
        raise HloError(f"The replica groups of {op.name} cannot be read: {text[:80]!r}")
    shape = _numbers(iota[1])
    return _iota(iota[2], iota[3]).reshape(shape[0], -1).tolist()


_IOTA = r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _numbers(text: str | None) -> list[int]:
    return [int(i) for i in (text or "").split(",") if i]


def _iota(shape: str, transposed: str | None) -> np.ndarray:
    """`[8,64]` with `T(1,0)`: the numbers from 0 in that shape, transposed, flat."""
    sizes = _numbers(shape)
    order = _numbers(transposed) or range(len(sizes))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(list(order)).reshape(-1)


def _mesh_groups(text: str) -> Groups:
    """`mesh['x'=4,'y'=128] {'y'}`: the devices that differ along the named axes only.

    `'y':(2)4` is the part of an axis that has 2 above it, and size 4.
    """
    found = re.match(r"mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text)
    if found is None:
        raise HloError(f"Replica groups cannot be read: {text[:80]!r}")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    ids = np.arange(math.prod(sizes.values()))
    order = re.search(r"\[[\d,]*\]" + _IOTA, found[2])
    listed = re.search(r"device_ids=\(?[\[({]([\d,]+)[\])}]", found[2])
    if order:
        ids = _iota(order[1], order[2])
    elif listed:
        ids = np.array(_numbers(listed[1]))
    elif "device_ids" in found[2]:
        raise HloError(f"The order of devices in a mesh cannot be read: {text[:120]!r}")
    shape: list[int] = []  # axes, those of which a part is named cut in three
    named: list[int] = []
    parts = {
        name: (int(above or 1), int(size) if size else sizes[name])
        for name, above, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3])
    }
    for name, size in sizes.items():
        if name in parts:
            above, part = parts[name]
            named.append(len(shape) + 1)
            shape += [above, part, size // (above * part)]
        else:
            shape.append(size)
    grid = ids.reshape(shape)
    rest = [axis for axis in range(len(shape)) if axis not in named]
    members = math.prod(shape[axis] for axis in named)
    return grid.transpose(rest + named).reshape(-1, members).tolist()
