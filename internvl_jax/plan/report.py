"""What the compiler's answer means: does it fit, how fast at best, what limits it."""

from __future__ import annotations

import dataclasses
from typing import Any

from internvl_jax.chips import Topology
from internvl_jax.config import to_dict
from internvl_jax.plan.compile import GIB, Compiled, PlanError, compile_step
from internvl_jax.plan.hlo import HloError, parse
from internvl_jax.plan.kernels import kernel_flops
from internvl_jax.plan.roofline import Rates, Report, roofline
from internvl_jax.sharding.mesh import AXES
from internvl_jax.train.experiment import Experiment


def rates(topology: Topology) -> Rates:
    """What one device of a topology does at best, per second."""
    chip = topology.chip
    n = chip.devices
    whole = topology.chips_per_slice * n if topology.slices > 1 else 0
    return Rates(chip.flops / n, chip.hbm_bandwidth / n, chip.ici / n, chip.dcn / n, whole)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One phase of a run on one topology, as the compiler sees it.

    Attributes:
        experiment: the run.
        topology: where.
        phase: which part of it.
        compiled: the compiler's answer.
        cost: the program held against the chip.
    """

    experiment: Experiment
    topology: Topology
    phase: int
    compiled: Compiled
    cost: Report

    @property
    def fits(self) -> bool:
        """The compiler took it, and arguments and temporaries together are within the chip's."""
        return not self.compiled.refusal and self.hbm_peak <= self.topology.chip.hbm

    @property
    def hbm_peak(self) -> float:
        """GiB per chip."""
        return self.compiled.memory.peak * self.topology.chip.devices / GIB

    @property
    def host_gib(self) -> float:
        """GiB per host that is offloaded."""
        chip = self.topology.chip
        per_host = min(chip.chips_per_host, self.topology.chips_per_slice) * chip.devices
        return self.compiled.memory.host * per_host / GIB

    @property
    def batch(self) -> int:
        return self.experiment.train.global_batch

    @property
    def steps(self) -> int:
        """Updates of the phase."""
        ends = [0, *(until for until, _ in self.experiment.schedule())]
        return ends[self.phase + 1] - ends[self.phase]

    @property
    def mesh(self) -> dict[str, int]:
        sizes = self.experiment.mesh.sizes(self.topology.chips * self.topology.chip.devices)
        return dict(zip(AXES, sizes, strict=True))

    @property
    def model_flops(self) -> float:
        """Analytic FLOPs of a step, per chip."""
        return self.experiment.schedule()[self.phase][1].flops() * self.batch / self.topology.chips

    @property
    def hlo_flops(self) -> float:
        """Matrix FLOPs that the scheduled program executes, per chip, loops multiplied out."""
        flops = self.cost.flops + sum(self.cost.kernel_flops.values())
        return flops * self.topology.chip.devices

    @property
    def flops_ratio(self) -> float:
        """Executed over model FLOPs: what is above 1 is recomputed, padded or duplicated."""
        return self.hlo_flops / self.model_flops

    @property
    def model_s(self) -> float:
        """Seconds of the model's FLOPs at peak."""
        return self.model_flops / self.topology.chip.flops

    @property
    def calibrated_s(self) -> float:
        """The least that a step takes if operations run as the compiler's own estimate has it."""
        return self.topology.chip.calibration * self.cost.roofline_s + self.cost.exposed_s

    @property
    def bound_a(self) -> float:
        """MFU if every operation ran at the chip's limit."""
        return self.model_s / self.cost.step_s

    @property
    def bound_b(self) -> float:
        """MFU if operations ran as the compiler's own estimate has it."""
        return self.model_s / self.calibrated_s

    @property
    def samples_per_s(self) -> tuple[float, float]:
        """By bound B and by bound A."""
        return self.batch / self.calibrated_s, self.batch / self.cost.step_s

    @property
    def days(self) -> tuple[float, float]:
        """Of the phase, by bound A and by bound B."""
        slow, fast = self.samples_per_s
        samples = self.steps * self.batch
        return samples / fast / 86400, samples / slow / 86400

    @property
    def host_link_s(self) -> float:
        """Seconds of the offloaded copies over the host link, were nothing else in their way."""
        rate = self.topology.chip.host_link / self.topology.chip.devices
        return self.cost.host_copies / rate

    def summary(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        topology, memory, cost = self.topology, self.compiled.memory, self.cost
        low, high = self.samples_per_s
        fast, slow = self.days
        return {
            "fits": self.fits,
            "refusal": self.compiled.refusal.split("\n")[0],
            "topology": topology.name,
            "accelerator": topology.accelerator,
            "slices": topology.slices,
            "chips": topology.chips,
            "hosts": topology.hosts,
            "mesh": self.mesh,
            "phase": self.phase,
            "global_batch": self.batch,
            "batch_per_chip": self.batch / topology.chips,
            "hbm_peak_gib": self.hbm_peak,
            "hbm_arguments_gib": memory.arguments * topology.chip.devices / GIB,
            "hbm_temporaries_gib": memory.temporaries * topology.chip.devices / GIB,
            "hbm_capacity_gib": topology.chip.hbm,
            "host_gib_per_host": self.host_gib,
            "host_capacity_gib": topology.chip.host_memory * 1e9 / GIB,
            "largest": [dataclasses.asdict(b) for b in memory.largest],
            "model_flops_per_chip": self.model_flops,
            "hlo_flops_per_chip": self.hlo_flops,
            "flops_ratio": self.flops_ratio,
            "hbm_bytes_per_chip": cost.bytes * topology.chip.devices,
            "host_bytes_per_chip": cost.host_copies * topology.chip.devices,
            "host_link_s": self.host_link_s,
            "model_s": self.model_s,
            "roofline_s": cost.roofline_s,
            "seconds_by_kind": cost.by_kind,
            "exposed_collectives_s": cost.exposed_s,
            "collectives": [dataclasses.asdict(c) for c in cost.collectives],
            "kernels": dict(cost.kernels),
            "calibration": topology.chip.calibration,
            "mfu_bound_a": self.bound_a,
            "mfu_bound_b": self.bound_b,
            "samples_per_s": [low, high],
            "images_per_s_per_host": [low / topology.hosts, high / topology.hosts],
            "phase_samples": self.steps * self.batch,
            "days": [fast, slow],
            "chip_hours": [24 * topology.chips * d for d in (fast, slow)],
            "compile_s": self.compiled.seconds,
            "versions": self.compiled.versions,
            "config": to_dict(self.experiment),
        }


def plan(
    experiment: Experiment,
    topology: Topology,
    *,
    phase: int = 0,
    dump: str | None = None,
    codegen: bool = False,
) -> Plan:
    """Compiles a phase's step for a topology and reads what comes out.

    Raises:
        ConfigError: what is asked for cannot be, in one sentence.
        PlanError: the compiler failed, or its program could not be read to the last operation.
    """
    compiled = compile_step(experiment, topology, phase=phase, dump=dump, codegen=codegen)
    try:
        cost = roofline(parse(compiled.text), rates(topology), kernel_flops)
    except HloError as error:
        raise PlanError(f"The compiled program could not be read: {error}") from error
    made = Plan(experiment, topology, phase, compiled, cost)
    if made.flops_ratio < 1:
        raise PlanError(
            f"The scheduled program shows only {made.flops_ratio:.3f} of the model's FLOPs: "
            "operations were not understood, and no figure from it would be right."
        )
    return made
