"""How long a compiled program would take at best: its schedule, held against a chip's rates.

Every operation takes as long as the slower of its matrix FLOPs at peak and its bytes at full memory
bandwidth; the sum over all that is executed is the roofline. Collectives come on top, as far as no
work that is scheduled between their start and their end hides them. Nothing is measured: kernels
are slower than that, and overlap is never perfect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from internvl_jax.plan.hlo import Module
from internvl_jax.plan.schedule import (
    KINDS,
    Collective,
    Executed,
    KernelFlops,
    Rates,
    Tally,
    Walk,
)
from internvl_jax.plan.trips import Scope

__all__ = ["Rates", "Report", "Collective", "Executed", "Line", "KINDS", "KernelFlops", "roofline"]


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table of what costs most: operations traced by the same code."""

    kind: str
    op_name: str
    code: str
    ops: int
    executions: int
    flops: float
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What a step takes of one device at best.

    Attributes:
        flops: matrix FLOPs of dots and convolutions, loops multiplied out.
        kernel_flops: of Pallas kernels, by name, as given; the program does not show them.
        kernels: how often each kernel runs.
        bytes: read and written in the chip's memory, collectives' own traffic excluded.
        host_copies: bytes moved to and from the host's memory.
        roofline_s: sum over executed operations of max(FLOPs / peak, bytes / bandwidth).
        collectives: by kind, network, and whether other work can run meanwhile.
        executed: every operation that costs anything, collectives aside.
        exchanged: every collective.
    """

    flops: float
    kernel_flops: Mapping[str, float]
    kernels: Mapping[str, int]
    bytes: float
    host_copies: float
    roofline_s: float
    collectives: tuple[Collective, ...]
    executed: tuple[Executed, ...] = dataclasses.field(repr=False)
    exchanged: tuple[Executed, ...] = dataclasses.field(repr=False)

    @property
    def exposed_s(self) -> float:
        """Seconds of collectives that nothing hides."""
        return sum(c.exposed for c in self.collectives)

    @property
    def step_s(self) -> float:
        """The least that a step takes: roofline and exposed collectives."""
        return self.roofline_s + self.exposed_s

    @property
    def by_kind(self) -> dict[str, float]:
        """Seconds of a step: where they go.

        `matmul` is matrix work that the matrix unit bounds, `kernel` Pallas kernels, `bandwidth`
        all other operations (matrix work among them that waits for memory, as in attention over
        short sequences), `copy` what changes layout or memory only, `host` what also reads or
        writes the host's memory, `collective` the exposed ones.
        """
        seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        for op in self.executed:
            seconds[op.kind] += op.seconds
        return seconds | {"collective": self.exposed_s}

    def top(self, n: int = 25) -> list[Line]:
        """What costs most, by the code that traced it: all layers of a scan are one line."""
        lines: dict[tuple[str, tuple[str, str]], list[Executed]] = {}
        for op in (*self.executed, *self.exchanged):
            lines.setdefault((op.kind, op.source), []).append(op)
        found = [
            Line(
                kind=kind,
                op_name=op_name or f"({ops[0].name})",
                code=code,
                ops=len(ops),
                executions=sum(op.trips for op in ops),
                flops=sum(op.flops for op in ops),
                bytes=sum(op.bytes for op in ops),
                seconds=sum(op.seconds for op in ops),
            )
            for (kind, (op_name, code)), ops in lines.items()
        ]
        return sorted(found, key=lambda line: -line.seconds)[:n]


def roofline(module: Module, rates: Rates, kernel_flops: KernelFlops | None = None) -> Report:
    """Holds a compiled program against a chip.

    Of a conditional, the branch that takes longest counts.

    Args:
        module: of the program's scheduled text.
        rates: of one device.
        kernel_flops: FLOPs of one call of a Pallas kernel, by its name, or computed from the name
            and the operation. Kernels not in it count 0.

    Raises:
        HloError: the text is not understood; `TripCountError` where a loop depends on data.
    """
    tally = Tally()
    Walk(module, rates, kernel_flops or {}).run(Scope(module, module.entry), 1, tally)
    kernels: dict[str, int] = {}
    flops: dict[str, float] = {}
    for name, calls, done in tally.kernels:
        kernels[name] = kernels.get(name, 0) + calls
        flops[name] = flops.get(name, 0.0) + done
    return Report(
        flops=sum(op.flops for op in tally.executed if op.kind != "kernel"),
        kernel_flops=flops,
        kernels=kernels,
        bytes=sum(op.bytes for op in tally.executed),
        host_copies=tally.host,
        roofline_s=sum(op.seconds for op in tally.executed),
        collectives=_summary(tally.moved),
        executed=tuple(tally.executed),
        exchanged=tuple(tally.exchanged),
    )


def _summary(moved: Iterable[Collective]) -> tuple[Collective, ...]:
    groups: dict[tuple, list[Collective]] = {}
    for c in moved:
        groups.setdefault((c.kind, c.asynchronous, c.network), []).append(c)
    return tuple(
        Collective(
            *key,
            count=sum(c.count for c in found),
            bytes=sum(c.bytes for c in found),
            seconds=sum(c.seconds for c in found),
            exposed=sum(c.exposed for c in found),
        )
        for key, found in sorted(groups.items())
    )
