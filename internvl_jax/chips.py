"""Accelerators: one table for train, plan and launch.

Peak rates are dense bf16 matrix FLOP/s of one chip as published by the vendor
(https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, NVIDIA data sheets).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Attributes:
        name: short name.
        kinds: prefixes of ``jax.Device.device_kind`` that mean this chip.
        flops: peak dense bf16 FLOP/s per chip.
        hbm: memory in GiB per chip.
        devices: JAX devices per chip.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm: float
    devices: int = 1


CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 32),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16),
    Chip("v5p", ("TPU v5p", "TPU v5"), 459e12, 95),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32),
    Chip("tpu7x", ("TPU7x", "TPU v7"), 2307e12, 192, devices=2),
    Chip("a100", ("NVIDIA A100",), 312e12, 80),
    Chip("h100", ("NVIDIA H100",), 989e12, 80),
    Chip("h200", ("NVIDIA H200",), 989e12, 141),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind a JAX device kind; None for a CPU or an unknown accelerator."""
    return next((c for c in CHIPS if device_kind.startswith(c.kinds)), None)


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of one JAX device, None where there is no figure (a CPU)."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.flops / chip.devices
