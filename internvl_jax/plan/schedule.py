"""Follows the schedule of a compiled program, and adds up what it keeps busy.

Every operation takes as long as the slower of its matrix FLOPs at peak and its bytes at full memory
bandwidth. A collective that other work can run beside is hidden by what is scheduled between its
start and its end; no work hides two of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

from internvl_jax.plan.collectives import Transfer, between_slices, transfer
from internvl_jax.plan.cost import Traffic, collective, inside, matrix_flops, target, traffic
from internvl_jax.plan.hlo import Computation, Module, Op
from internvl_jax.plan.trips import Scope

KernelFlops = Mapping[str, float] | Callable[[str, Op], float]
KINDS = ("matmul", "kernel", "bandwidth", "copy", "host", "collective")


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one device does at best, per second.

    Attributes:
        flops: dense bf16 matrix FLOP/s.
        hbm: bytes/s of its memory.
        ici: bytes/s to the other devices of its slice.
        dcn: bytes/s to other slices.
        devices_per_slice: device ids below it are slice 0, and so on; 0 for a single slice.
    """

    flops: float
    hbm: float
    ici: float
    dcn: float = 6.25e9
    devices_per_slice: int = 0


@dataclasses.dataclass(frozen=True)
class Executed:
    """One operation of the text, with all its executions in a step.

    Attributes:
        name: in the text.
        kind: one of `KINDS`.
        source: traced name, e.g. "jit(step)/jvp()/while/body/dot_general", and the code that
            traced it, "dense (dense.py:24) < Mlp.__call__ (mlp.py:48)".
        trips: times executed.
        flops: matrix FLOPs, all executions; a kernel's where they were given.
        bytes: in the chip's memory, all executions; a collective's over the network.
        seconds: roofline of all executions; what nothing hides of a collective.
    """

    name: str
    kind: str
    source: tuple[str, str]
    trips: int
    flops: float
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a step.

    Attributes:
        kind: all-gather, reduce-scatter, ...
        asynchronous: other work can run meanwhile.
        network: `ici` within a slice, `dcn` between slices.
        count: how many are executed.
        bytes: per device; see `collectives`.
        seconds: what they take.
        exposed: seconds of them that no other work hides.
    """

    kind: str
    asynchronous: bool
    network: str
    count: int
    bytes: float
    seconds: float
    exposed: float


@dataclasses.dataclass
class Tally:
    """What a walk has found so far."""

    executed: list[Executed] = dataclasses.field(default_factory=list)
    exchanged: list[Executed] = dataclasses.field(default_factory=list)
    moved: list[Collective] = dataclasses.field(default_factory=list)
    kernels: list[tuple[str, int, float]] = dataclasses.field(default_factory=list)
    host: float = 0.0

    def add(self, other: Tally) -> None:
        self.executed += other.executed
        self.exchanged += other.exchanged
        self.moved += other.moved
        self.kernels += other.kernels
        self.host += other.host

    @property
    def seconds(self) -> float:
        return sum(op.seconds for op in self.executed) + sum(c.exposed for c in self.moved)


@dataclasses.dataclass
class _Open:
    """A collective under way: its seconds that no work has hidden so far."""

    op: Op
    transfer: Transfer
    left: float


class Walk:
    """Follows the schedule, computation by computation.

    `run` returns the seconds of one execution that have hidden no collective yet: what is scheduled
    beside a loop can be hidden by them, and by nothing that a collective in the loop already used.
    """

    def __init__(self, module: Module, rates: Rates, kernel_flops: KernelFlops) -> None:
        self.module = module
        self.rates = rates
        self.kernel_flops = kernel_flops

    def run(self, scope: Scope, trips: int, tally: Tally) -> float:
        open_: dict[str, _Open] = {}  # by the name of the start, or by channel
        free = 0.0
        for op in scope.computation.ops:
            seconds = self._visit(scope, op, trips, tally, open_)
            for started in open_.values():
                hidden = min(started.left, seconds)
                started.left -= hidden
                seconds -= hidden
            free += seconds
        for started in open_.values():  # ends in another computation: as good as here
            self._done(tally, trips, started)
        return free

    def _visit(
        self, scope: Scope, op: Op, trips: int, tally: Tally, open_: dict[str, _Open]
    ) -> float:
        """Accounts for one operation. Returns its seconds per execution that hid nothing yet."""
        if op.opcode == "while":
            count = scope.trips(op)
            return count * self.run(scope.body(op), trips * count, tally) if count else 0.0
        if op.opcode == "call":
            return self.run(scope.enter(op), trips, tally)
        if op.opcode == "conditional":
            return self._longest_branch(scope, op, trips, tally)
        if op.opcode.startswith("async-"):
            return self._wrapped(scope, op, trips, tally, open_)
        if op.opcode == "send" and (sent := between_slices(op)):
            meeting, move = sent
            open_[meeting] = self._start(op, move)
            return 0.0
        if op.opcode == "recv-done":
            received = between_slices(scope.computation.by_name[op.operands[0]])
            if received and received[0] in open_:
                self._done(tally, trips, open_.pop(received[0]))
            return 0.0
        if collective(op):
            found = self._transfer(scope.computation, op)
            if op.opcode.endswith("-start"):
                open_[op.name] = self._start(op, found)
            else:
                self._moved(tally, trips, op, found)
            return 0.0
        if op.opcode.endswith("-done") and op.operands[0] in open_:
            self._done(tally, trips, open_.pop(op.operands[0]))
            return 0.0
        seconds = self._execute(scope.computation, op, trips, tally)
        if op.opcode == "fusion":
            return self._fused(op, trips, tally, open_, seconds)
        return seconds

    def _longest_branch(self, scope: Scope, op: Op, trips: int, tally: Tally) -> float:
        branches = []
        for inner in scope.branches(op):
            branch = Tally()
            free = self.run(inner, trips, branch)
            branches.append((branch.seconds, free, branch))
        _, free, longest = max(branches, key=lambda branch: branch[0])
        tally.add(longest)
        return free

    def _wrapped(
        self, scope: Scope, op: Op, trips: int, tally: Tally, open_: dict[str, _Open]
    ) -> float:
        """An asynchronous wrapper: start, any number of updates, done.

        On the SparseCore, a start without operands waits for an update that brings them.
        """
        if op.opcode == "async-done":
            first = self._start_of(scope.computation, op)
            if first is None:
                return 0.0
            for name in [name for name in open_ if name.split("/")[0] == first.name]:
                self._done(tally, trips, open_.pop(name))
            return 0.0
        start = self._start_of(scope.computation, op)
        if start is None:
            return 0.0
        if len(op.operands) == (0 if op is start else 1):
            return 0.0
        if op is not start and start.operands:
            return 0.0
        seconds = 0.0
        for i, (computation, inner) in enumerate(self._unwrap(start)):
            if collective(inner):
                open_[f"{start.name}/{i}"] = self._start(inner, self._transfer(computation, inner))
            else:
                seconds += self._execute(computation, inner, trips, tally)
        return seconds

    def _start_of(self, computation: Computation, op: Op) -> Op | None:
        """None where it started in another computation, as in a loop's last iteration."""
        while op.opcode != "async-start":
            if not op.opcode.startswith("async-"):
                return None
            op = computation.by_name[op.operands[0]]
        return op

    def _unwrap(self, op: Op) -> Iterable[tuple[Computation, Op]]:
        """What a wrapper runs, however many wrappers there are."""
        for name in op.called("calls", "to_apply", "called_computations"):
            computation = self.module.computation(name)
            for inner in computation.ops:
                nested = inner.opcode in ("async-start", "call")
                if nested or inner.called("called_computations"):
                    yield from self._unwrap(inner)
                else:
                    yield computation, inner

    def _fused(
        self, op: Op, trips: int, tally: Tally, open_: dict[str, _Open], seconds: float
    ) -> float:
        """Collectives within a fusion.

        Those of the TPU's asynchronous kind are spread over a fusion that starts them, fusions
        whose own work runs beside them, and one that ends them. Others hide behind the work of
        their fusion, or stop everything if it has none.
        """
        body = list(inside(self.module, op))
        found = [(inner, where) for inner, where in body if collective(inner)]
        if not found:
            return seconds
        targets = {target(inner) for inner, _ in body}
        scattered = any(inner.opcode == "dynamic-slice" for inner, _ in body)
        for inner, where in found:
            move = self._transfer(where, inner)
            key = f"channel {move.channel}"
            if "AsyncCollectiveStart" in targets:
                open_[key] = self._start(inner, move)
            elif key in open_:
                if "AsyncCollectiveDone" in targets:
                    self._done(tally, trips, open_.pop(key))
            elif any(where.opcode in ("dot", "convolution") for where, _ in body):
                under_way = self._start(inner, move)
                hidden = min(under_way.left, seconds)
                under_way.left, seconds = under_way.left - hidden, seconds - hidden
                self._done(tally, trips, under_way)
            else:
                if move.kind == "all-reduce" and scattered:
                    move = dataclasses.replace(move, kind="reduce-scatter")
                self._moved(tally, trips, inner, move)
        return seconds

    # ---- one operation

    def _execute(self, computation: Computation, op: Op, trips: int, tally: Tally) -> float:
        """Enters an operation that is neither control flow nor a collective."""
        moved = traffic(self.module, computation, op)
        flops = matrix_flops(self.module, computation, op)
        kernel = _kernel(self.module, op)
        if kernel is not None:
            name = re.sub(r"(\.\d+)+$", "", kernel.name)
            flops = self._kernel_flops(name, kernel)
            tally.kernels.append((name, trips, flops * trips))
        by_flops, by_bytes = flops / self.rates.flops, moved.hbm / self.rates.hbm
        seconds = max(by_flops, by_bytes)
        tally.host += trips * moved.host
        if seconds or moved.host:
            tally.executed.append(
                Executed(
                    name=op.name,
                    kind="kernel"
                    if kernel is not None
                    else _kind(self.module, op, moved, by_flops, by_bytes),
                    source=(op.op_name, self.module.sources.get(op.frame, "")),
                    trips=trips,
                    flops=flops * trips,
                    bytes=moved.hbm * trips,
                    seconds=seconds * trips,
                )
            )
        return seconds

    def _kernel_flops(self, name: str, op: Op) -> float:
        if callable(self.kernel_flops):
            return self.kernel_flops(name, op)
        return self.kernel_flops.get(name, 0.0)

    # ---- one collective

    def _transfer(self, computation: Computation, op: Op) -> Transfer:
        devices = self.module.partitions
        return transfer(computation, op, devices, self.rates.devices_per_slice or devices)

    def _seconds(self, move: Transfer) -> float:
        return move.seconds(self.rates.ici, self.rates.dcn)

    def _start(self, op: Op, move: Transfer) -> _Open:
        return _Open(op, move, self._seconds(move))

    def _done(self, tally: Tally, trips: int, started: _Open) -> None:
        self._moved(tally, trips, started.op, started.transfer, started.left, asynchronous=True)

    def _moved(
        self,
        tally: Tally,
        trips: int,
        op: Op,
        move: Transfer,
        exposed: float | None = None,
        asynchronous: bool = False,
    ) -> None:
        seconds = self._seconds(move)
        exposed = seconds if exposed is None else exposed
        tally.exchanged.append(
            Executed(
                name=op.name,
                kind="collective",
                source=(f"{move.kind}: {op.op_name}", self.module.sources.get(op.frame, "")),
                trips=trips,
                flops=0.0,
                bytes=move.bytes * trips,
                seconds=exposed * trips,
            )
        )
        tally.moved.append(
            Collective(
                kind=move.kind,
                asynchronous=asynchronous,
                network=move.network,
                count=trips,
                bytes=move.bytes * trips,
                seconds=seconds * trips,
                exposed=exposed * trips,
            )
        )


_COPIES = {"copy", "copy-start", "transpose", "reshape", "slice"}
_MOVING = {*_COPIES, "dynamic-slice", "dynamic-update-slice", "pad", "concatenate", "bitcast"}


def _kind(module: Module, op: Op, moved: Traffic, by_flops: float, by_bytes: float) -> str:
    if moved.host:
        return "host"
    if by_flops > by_bytes:
        return "matmul"
    if op.opcode in _COPIES:
        return "copy"
    if op.opcode == "fusion":
        idle = {"parameter", "constant", "tuple", "get-tuple-element", "convert", *_MOVING}
        if all(inner.opcode in idle for inner, _ in inside(module, op)):
            return "copy"
    return "copy" if op.opcode in _MOVING else "bandwidth"


def _kernel(module: Module, op: Op) -> Op | None:
    """The Pallas kernel that an operation is or holds."""
    inner = [fused for fused, _ in inside(module, op)] if op.opcode == "fusion" else [op]
    return next((op for op in inner if target(op) == "tpu_custom_call"), None)
