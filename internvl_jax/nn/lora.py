"""LoRA: low-rank adapters beside kernels that stay as they are (https://arxiv.org/abs/2106.09685).

The adapter of a kernel ``attn/qkv`` rests beside it as ``attn/qkv_lora/a`` and ``attn/qkv_lora/b``.
It is computed beside it as well: the kernel's own gradient, as large as the kernel, never exists.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from internvl_jax.nn.dense import dense
from internvl_jax.nn.param import param, zeros
from internvl_jax.nn.regularize import Randomness, dropout

SUFFIX = "_lora"
# An adapter's place in this list is part of its dropout's key: append, never insert.
KERNELS = (
    *("attn/qkv", "attn/q", "attn/k", "attn/v", "attn/out"),
    *("mlp/fc1", "mlp/fc2", "mlp/gate", "mlp/up", "mlp/down"),
    *("cross/q", "cross/k", "cross/v", "cross/out"),
)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters of a tower. True where there are any.

    Attributes:
        rank: r; 0 for no adapters.
        alpha: adapters are scaled by alpha / rank; None is twice the rank, as in the released code.
        dropout: rate at which entries of an adapter's input are zeroed in training.
        targets: kernels that get one, by their names in `KERNELS`; empty for all of the tower's.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.05
    targets: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} must be at least 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must lie in [0, 1).")

    def __bool__(self) -> bool:
        return self.rank > 0

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Whether the kernel of that name gets an adapter."""
        return bool(self) and (not self.targets or name in self.targets)

    def check(self, kernels: Iterable[str]) -> None:
        """Raises ValueError where a target is none of a tower's kernels."""
        names = list(kernels)
        for target in self.targets:
            if target not in names:
                raise ValueError(f"lora.targets has {target!r}: use some of {', '.join(names)}.")

    def param_count(self, kernels: Mapping[str, tuple[int, int]]) -> int:
        """Number of parameters that the adapters of some kernels have.

        Args:
            kernels: (inputs, outputs) by name.
        """
        return self.rank * sum(sum(size) for name, size in kernels.items() if self.adapts(name))


class Lora(nnx.Module):
    """The adapter of one kernel: ``scale * b(a(dropout(x)))``, zero at first.

    ``a`` [*in, r] is drawn as peft draws it, uniformly within inputs^-1/2; ``b`` [r, *out] is zero.
    """

    def __init__(
        self, cfg: LoraConfig, name: str, kernel: nnx.Param, contract: int, rngs: nnx.Rngs
    ):
        axes = kernel.get_metadata()["axes"]
        self.inputs, outputs = kernel.shape[:contract], kernel.shape[contract:]
        self.scale, self.rate, self.index = cfg.scale, cfg.dropout, KERNELS.index(name)
        bound = math.prod(self.inputs) ** -0.5
        init = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        self.a = param(rngs, (*self.inputs, cfg.rank), (*axes[:contract], None), init)
        self.b = param(rngs, (cfg.rank, *outputs), (None, *axes[contract:]), zeros)

    def down(self, x: jax.Array, random: Randomness | None) -> jax.Array:
        """[B, ..., *in] -> [B, ..., r], scaled; `random` is the layer's, None drops nothing."""
        n = len(self.inputs)
        if random is not None and self.rate:
            # Of the true shape: heads padded for a mesh must not change what is drawn.
            shape = (*x.shape[1:-n], *self.inputs)
            x = dropout(x, self.rate, random.fold(2 + self.index), shape)
        return dense(x, self.a[...], contract=n) * self.scale


def adapter(
    cfg: LoraConfig | None, name: str, kernel: nnx.Param, *, contract: int = 1, rngs: nnx.Rngs
) -> Lora | None:
    """The adapter of a kernel, None where the config wants none.

    Args:
        cfg: of the tower.
        name: one of `KERNELS`.
        kernel: what it adapts, with `contract` axes of inputs.
        contract: number of input axes.
        rngs: supplies the ``params`` stream.
    """
    if cfg is None or not cfg.adapts(name):
        return None
    return Lora(cfg, name, kernel, contract, rngs)


def adapted(
    x: jax.Array,
    kernel: jax.Array,
    lora: Lora | None,
    random: Randomness | None,
    *,
    contract: int = 1,
    gain: jax.Array | None = None,
) -> jax.Array:
    """A linear layer with its adapter, if it has one: see `nn.dense.dense`.

    Args:
        x: [B, ..., *in].
        kernel: [*in, *out].
        lora: the kernel's adapter.
        random: the layer's, for the adapter's dropout.
        contract: number of input axes.
        gain: LayerScale over the last axis that is folded into the kernel already.

    Returns:
        [B, ..., *out] in x's dtype.
    """
    y = dense(x, kernel, contract=contract)
    if lora is None:
        return y
    b = lora.b[...] if gain is None else lora.b[...].astype(jnp.float32) * gain
    return y + dense(lora.down(x, random), b)


def merged(kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """The kernel that does what kernel and adapter do: kernel + scale * a b.

    Args:
        kernel: [*in, *out] of one layer, numpy or jax.
        a: [*in, r].
        b: [r, *out].
        scale: `LoraConfig.scale`.

    Returns:
        Like `kernel`, computed in float32.
    """
    np_ = jnp if isinstance(kernel, jax.Array) else np
    kernel32, a32, b32 = (np_.asarray(w).astype(np.float32) for w in (kernel, a, b))
    return (kernel32 + np.float32(scale) * np_.tensordot(a32, b32, 1)).astype(kernel.dtype)


def adapters(paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Paths of (a, b) by the path of the kernel that they adapt."""
    ends = f"{SUFFIX}/a"
    kernels = [path.removesuffix(ends) for path in paths if path.endswith(ends)]
    return {k: (f"{k}{SUFFIX}/a", f"{k}{SUFFIX}/b") for k in kernels}
