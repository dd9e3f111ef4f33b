"""Accelerators and slices of them: one table for train, plan and launch.

Capacities and rates are the vendors' (https://cloud.google.com/tpu/docs, the page of each version;
NVIDIA's data sheets), except where a field says that they are assumed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator chip.

    Attributes:
        name: short name, the first part of a topology's.
        kinds: prefixes of ``jax.Device.device_kind`` that mean this chip.
        flops: peak dense bf16 FLOP/s per chip.
        hbm: GiB per chip that a program can use; for TPUs what the compiler allows.
        devices: JAX devices per chip.
        hbm_bandwidth: bytes/s per chip.
        ici: bytes/s per chip that a collective within a slice gets through. Assumed: half of all
            links' published rate in one direction.
        dcn: bytes/s per chip between slices: published Gbit/s per chip, of v4 assumed.
        host_link: bytes/s per chip to its host's memory (PCIe). Assumed.
        dims: dimensions of the interconnect's torus.
        chips_per_host: of slices of more than one host.
        host_memory: GB per host, as published.
        cores: TensorCores per chip, which the cloud's accelerator names count on some versions.
        cloud: the cloud's name of the version.
        flags: compiler options that help any of the programs here.
        calibration: the compiler's own estimate of a plain program in multiples of the roofline;
            measured by ``python -m internvl_jax.plan --calibrate`` (libtpu 0.0.51).
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm: float
    devices: int = 1
    hbm_bandwidth: float = 0.0
    ici: float = 0.0
    dcn: float = 0.0
    host_link: float = 0.0
    dims: int = 0
    chips_per_host: int = 4
    host_memory: float = 0.0
    cores: int = 1
    cloud: str = ""
    flags: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)
    calibration: float = 1.0


# Collectives run on the SparseCores, beside the matrix units, instead of stopping them.
SPARSE_CORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": True,
    "xla_tpu_enable_all_gather_offload_tracing": "true",
}

# Gathers of parameters run beside the matrix units; without, they stop them.
ASYNC_GATHER = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
}

CHIPS = (
    Chip(
        "v4",
        ("TPU v4",),
        275e12,
        30.75,
        hbm_bandwidth=1228e9,
        ici=135e9,
        dcn=3.125e9,
        host_link=8e9,
        dims=3,
        host_memory=407,
        cores=2,
        cloud="v4",
        calibration=1.02,
        flags=ASYNC_GATHER,
    ),
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        197e12,
        15.75,
        hbm_bandwidth=819e9,
        ici=90e9,
        dcn=3.125e9,
        host_link=8e9,
        dims=2,
        host_memory=192,
        cloud="v5litepod",
        calibration=1.013,
    ),
    Chip(
        "v5p",
        ("TPU v5p", "TPU v5"),
        459e12,
        95.73,
        hbm_bandwidth=2765e9,
        ici=270e9,
        dcn=6.25e9,
        host_link=8e9,
        dims=3,
        host_memory=448,
        cores=2,
        cloud="v5p",
        calibration=1.168,
        flags=SPARSE_CORE,
    ),
    Chip(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        918e12,
        31.24,
        hbm_bandwidth=1640e9,
        ici=180e9,
        dcn=12.5e9,
        host_link=16e9,
        dims=2,
        host_memory=720,
        cloud="v6e",
        calibration=1.019,
        flags=SPARSE_CORE,
    ),
    Chip(
        "tpu7x",
        ("TPU7x", "TPU v7"),
        2307e12,
        189.5,
        devices=2,
        hbm_bandwidth=7380e9,
        ici=540e9,
        dcn=12.5e9,
        host_link=16e9,
        dims=3,
        host_memory=960,
        cores=2,
        cloud="tpu7x",
        calibration=1.156,
    ),
    Chip("a100", ("NVIDIA A100",), 312e12, 80, hbm_bandwidth=2039e9),
    Chip("h100", ("NVIDIA H100",), 989e12, 80, hbm_bandwidth=3350e9),
    Chip("h200", ("NVIDIA H200",), 989e12, 141, hbm_bandwidth=4800e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind a JAX device kind; None for a CPU or an unknown accelerator."""
    return next((c for c in CHIPS if device_kind.startswith(c.kinds)), None)


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of one JAX device, None where there is no figure (a CPU)."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.flops / chip.devices


def compiler_options(device_kind: str) -> dict[str, str | bool]:
    """What the compiler is told on a JAX device kind; nothing where the chip is unknown."""
    chip = chip_of(device_kind)
    return {} if chip is None else dict(chip.flags)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some TPU slices of one shape.

    Attributes:
        chip: kind of chip.
        shape: chips along each axis of one slice.
        slices: how many, joined by the data-centre network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, name: str, slices: int = 1) -> Topology:
        """``v5p:8x8x8`` -> a topology; ``v5p:2x8x8x8`` is two slices of that shape.

        Raises:
            ValueError: in a sentence, for what is none.
        """
        kind, _, shape = name.partition(":")
        known = {c.name: c for c in CHIPS if c.dims}
        if kind not in known:
            near = difflib.get_close_matches(kind, known, n=1) or list(known)
            raise ValueError(
                f"Unknown chip {kind!r} in topology {name!r}: use {' or '.join(near)}, as in "
                f"v5p:8x8x8 or v5e:16x16."
            )
        chip = known[kind]
        sizes = [int(n) for n in shape.split("x")] if _numbers(shape) else []
        if len(sizes) == chip.dims + 1 and slices == 1:
            slices = sizes.pop(0)
        if len(sizes) != chip.dims or min(sizes) < 1:
            example = "x".join(["8"] * chip.dims)
            raise ValueError(
                f"Topology {name!r}: {kind} slices have {chip.dims} sizes, as in {kind}:{example}."
            )
        if slices < 1:
            raise ValueError(f"slices={slices}: there is at least one.")
        return cls(chip, tuple(sizes), slices)

    @property
    def slice_name(self) -> str:
        """One slice, as the compiler names it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        sizes = self.shape if self.slices == 1 else (self.slices, *self.shape)
        return f"{self.chip.name}:{'x'.join(map(str, sizes))}"

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        return self.slices * self.chips_per_slice

    @property
    def hosts(self) -> int:
        return self.slices * -(-self.chips_per_slice // self.chip.chips_per_host)

    @property
    def accelerator(self) -> str:
        """The cloud's name of one slice, which on some versions counts TensorCores."""
        return f"{self.chip.cloud}-{self.chips_per_slice * self.chip.cores}"


def _numbers(shape: str) -> bool:
    return bool(shape) and all(part.isdigit() for part in shape.split("x"))
