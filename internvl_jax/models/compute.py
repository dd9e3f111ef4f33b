"""How a model is computed, as opposed to what it is."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from internvl_jax.nn.attend import IMPLEMENTATIONS
from internvl_jax.nn.stack import parse_remat

TOWERS = ("vision", "qllama", "llm")


@dataclasses.dataclass(frozen=True)
class Compute:
    """Settings that change speed and memory but neither parameters nor checkpoints.

    Attributes:
        dtype: activations and matrix products; norms, softmax and losses stay in float32.
        remat: what a layer's backward pass may keep, see `nn.stack.parse_remat`; an entry of the
            list may be one tower's alone, as in ``vision/fc1:24,gate``.
        head_multiple: InternViT's heads are padded to a multiple of it; a run sees to it that its
            mesh's tensor axis divides it.
        unroll: layers per iteration of the scan; all of them at once is faster for a small model,
            whose compilation is short anyway.
        attention: how self-attention is computed, one of `nn.attend.IMPLEMENTATIONS`; ``auto`` goes
            by platform, length and dtype.
    """

    dtype: str = "bfloat16"
    remat: str = "full"
    head_multiple: int = 1
    unroll: int = 1
    attention: str = "auto"

    def __post_init__(self):
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"compute.dtype is {self.dtype!r}: use bfloat16 or float32.")
        for tower in TOWERS:
            parse_remat(self._remat(tower))
        if self.unroll < 1:
            raise ValueError(f"compute.unroll is {self.unroll}: it counts layers, from 1.")
        if self.attention not in IMPLEMENTATIONS:
            raise ValueError(f"compute.attention is {self.attention!r}: use {IMPLEMENTATIONS}.")
        if self.attention == "cudnn" and self.dtype == "float32":
            raise ValueError(
                "compute.attention='cudnn' computes in half precision only: set "
                "compute.dtype='bfloat16', or attention='einsum'."
            )

    def of(self, tower: str) -> Compute:
        """The settings of one tower."""
        return dataclasses.replace(self, remat=self._remat(tower))

    def _remat(self, tower: str) -> str:
        mine = []
        for entry in self.remat.split(","):
            owner, _, rest = entry.strip().rpartition("/")
            if owner not in ("", *TOWERS):
                raise ValueError(
                    f"compute.remat={self.remat!r}: there is no tower {owner!r}, use "
                    f"{', '.join(TOWERS)}."
                )
            mine += [rest] if owner in ("", tower) else []
        return ",".join(mine) or "full"

    @property
    def jnp_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)
