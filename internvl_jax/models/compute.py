"""How a model is computed, as opposed to what it is."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from internvl_jax.nn.stack import remat_policy


@dataclasses.dataclass(frozen=True)
class Compute:
    """Settings that change speed and memory but neither parameters nor checkpoints.

    Attributes:
        dtype: activations and matrix products; norms, softmax and losses stay in float32.
        remat: what a layer's backward pass may keep, see `nn.stack.remat_policy`.
        head_multiple: InternViT's heads are padded to a multiple of it; a run sees to it that its
            mesh's tensor axis divides it.
        unroll: layers per iteration of the scan; all of them at once is faster for a small model,
            whose compilation is short anyway.
    """

    dtype: str = "bfloat16"
    remat: str = "full"
    head_multiple: int = 1
    unroll: int = 1

    def __post_init__(self):
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"compute.dtype is {self.dtype!r}: use bfloat16 or float32.")
        remat_policy(self.remat)
        if self.unroll < 1:
            raise ValueError(f"compute.unroll is {self.unroll}: it counts layers, from 1.")

    @property
    def jnp_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)
