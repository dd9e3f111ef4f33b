"""InternViT (https://arxiv.org/abs/2312.14238, section 3.2 and Table 1)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from internvl_jax.batch import MEAN, STD
from internvl_jax.models.compute import Compute
from internvl_jax.nn.attention import VitAttention
from internvl_jax.nn.embed import PatchEmbed, resize_positions
from internvl_jax.nn.lora import LoraConfig
from internvl_jax.nn.mlp import Mlp
from internvl_jax.nn.norm import make_norm
from internvl_jax.nn.param import constant, kernel_init, normal, param
from internvl_jax.nn.regularize import Randomness, drop_path, keep_tokens
from internvl_jax.nn.stack import Run, Stack
from internvl_jax.sharding.rules import constrain


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Architecture of an InternViT.

    The 6B models use ``norm="rms"``, ``qk_norm=True``, ``qkv_bias=False``; the 300M ones
    ``norm="layer"``, ``qk_norm=False``, ``qkv_bias=True``.

    Attributes:
        image_size: native size in pixels; fixes the position table.
        drop_path: rate; ``drop_path_mode="uniform"`` gives it to every layer (paper, Table 20),
            ``"linear"`` ramps 0..rate over the depth (released code).
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 3200
    depth: int = 48
    heads: int = 25
    mlp_dim: int = 12800
    norm: str = "rms"
    qk_norm: bool = True
    qkv_bias: bool = False
    eps: float = 1e-6
    layer_scale: float = 0.1
    drop_path: float = 0.0
    drop_path_mode: str = "uniform"
    lora: LoraConfig | None = None

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(
                f"vision.width={self.width} is not a multiple of vision.heads={self.heads}."
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"vision.image_size={self.image_size} is not a multiple of "
                f"patch_size={self.patch_size}."
            )
        if self.drop_path_mode not in ("uniform", "linear"):
            raise ValueError(f"drop_path_mode={self.drop_path_mode!r}: use 'uniform' or 'linear'.")
        if self.lora:
            self.lora.check(self.kernels())

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    def drop_path_rates(self) -> np.ndarray:
        """[L] probability per layer."""
        if self.drop_path_mode == "uniform":
            return np.full(self.depth, self.drop_path, np.float32)
        return np.linspace(0, self.drop_path, self.depth, dtype=np.float32)

    def kernels(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's matrices, as `LoraConfig.targets` names them."""
        D, F = self.width, self.mlp_dim
        return {
            "attn/qkv": (D, 3 * D),
            "attn/out": (D, D),
            "mlp/fc1": (D, F),
            "mlp/fc2": (F, D),
        }

    def param_count(self) -> int:
        """Number of parameters, adapters included."""
        D, F = self.width, self.mlp_dim
        norm = D if self.norm == "rms" else 2 * D
        layer = 2 * norm + 2 * D + 3 * D * D + D * D + D + 2 * D * F + F + D
        layer += 3 * D * self.qkv_bias + 2 * D * self.qk_norm
        embed = self.patch_size**2 * 3 * D + D + D + (1 + self.grid**2) * D
        layer += self.lora.param_count(self.kernels()) if self.lora else 0
        return self.depth * layer + embed

    def flops(self, tokens: int | None = None) -> int:
        """Forward matrix-product FLOPs of one image (2 per multiply-add).

        Args:
            tokens: tokens that enter the blocks, CLS included; the native number by default.
        """
        P = 1 + self.grid**2 if tokens is None else tokens
        D, F = self.width, self.mlp_dim
        layer = 2 * P * (4 * D * D + 2 * D * F) + 4 * P * P * D
        patches = self.grid**2 if tokens is None else max(tokens - 1, 0)
        return self.depth * layer + 2 * patches * 3 * self.patch_size**2 * D


class VisionOutput(NamedTuple):
    """tokens [B, P, D] after the last block (no final norm); taps [B, P, D] per asked layer."""

    tokens: jax.Array
    taps: tuple[jax.Array, ...]
    hidden: jax.Array | None


def normalize_images(images: jax.Array | np.ndarray) -> jax.Array:
    """uint8 [..., S, S, 3] -> float32, ImageNet mean and standard deviation."""
    mean, std = (np.asarray(v, np.float32) * 255.0 for v in (MEAN, STD))
    return (jnp.asarray(images, jnp.float32) - mean) / std


class Block(nnx.Module):
    """x += dp(ls1 * attn(norm1 x)); x += dp(ls2 * mlp(norm2 x))."""

    def __init__(self, cfg: VitConfig, compute: Compute, *, rngs: nnx.Rngs):
        D, init = cfg.width, kernel_init(cfg.width)
        self.norm1 = make_norm(cfg.norm, D, eps=cfg.eps, rngs=rngs)
        self.attn = VitAttention(
            D,
            cfg.heads,
            qkv_bias=cfg.qkv_bias,
            qk_norm=cfg.qk_norm,
            eps=cfg.eps,
            rngs=rngs,
            init=init,
            out_init=init,
            implementation=compute.attention,
            lora=cfg.lora,
        )
        self.ls1 = param(rngs, (D,), ("embed",), constant(cfg.layer_scale))
        self.norm2 = make_norm(cfg.norm, D, eps=cfg.eps, rngs=rngs)
        self.mlp = Mlp(D, cfg.mlp_dim, rngs=rngs, init=init, lora=cfg.lora)
        self.ls2 = param(rngs, (D,), ("embed",), constant(cfg.layer_scale))

    def __call__(
        self, x: jax.Array, rate: jax.Array | None, random: Randomness | None
    ) -> jax.Array:
        attn = self.attn(self.norm1(x), gain=self.ls1[...], random=random)
        x = checkpoint_name(x + _dropped(attn, rate, random, 0), "mid")
        mlp = self.mlp(self.norm2(x), gain=self.ls2[...], random=random)
        return constrain(x + _dropped(mlp, rate, random, 1), "batch", None, None)


def _dropped(
    x: jax.Array, rate: jax.Array | None, random: Randomness | None, branch: int
) -> jax.Array:
    if random is None or rate is None:
        return x
    return drop_path(x, rate, jax.random.fold_in(random.key, branch), random.example)


class InternViT(nnx.Module):
    """The vision tower: patches, CLS, positions, blocks; no final norm, no head."""

    def __init__(self, cfg: VitConfig, compute: Compute, *, rngs: nnx.Rngs):
        D = cfg.width
        self.cfg, self.compute = cfg, compute
        self.patch = PatchEmbed(cfg.patch_size, D, rngs=rngs, init=kernel_init(D))
        self.cls = param(rngs, (D,), ("embed",), normal(0.02))
        self.pos = param(rngs, (1 + cfg.grid**2, D), (None, "embed"), normal(0.02))
        self.blocks = Stack(functools.partial(Block, cfg, compute), cfg.depth, rngs=rngs)
        # BEiT's depth-wise initialisation: block l's output projections shrink by sqrt(2 l).
        shrink = (2.0 * jnp.arange(1, cfg.depth + 1)) ** -0.5
        layers: Any = self.blocks.layers
        for kernel in (layers.attn.out, layers.mlp.fc2):
            value = kernel[...]
            kernel[...] = value * shrink.reshape(-1, *(1,) * (value.ndim - 1))

    def embed(self, images: jax.Array) -> jax.Array:
        """Normalised images [B, h, w, 3] of any size the patch divides -> [B, 1 + P, D]."""
        dtype = self.compute.jnp_dtype
        grid = (images.shape[1] // self.cfg.patch_size, images.shape[2] // self.cfg.patch_size)
        x = self.patch(images.astype(dtype))
        cls = jnp.broadcast_to(self.cls[...].astype(dtype), (x.shape[0], 1, x.shape[-1]))
        pos = resize_positions(self.pos[...], grid).astype(dtype)
        return constrain(jnp.concatenate([cls, x], axis=1) + pos, "batch", None, None)

    def __call__(
        self,
        images: jax.Array,
        *,
        keep: int | None = None,
        random: Randomness | None = None,
        taps: Sequence[int] = (),
        hidden: bool = False,
    ) -> VisionOutput:
        """Encodes images.

        Args:
            images: [B, h, w, 3], normalised; other sizes than the native one interpolate the table.
            keep: train on a random subset of that many patch tokens (needs `random`).
            random: turns drop path, dropout and token masking on; None is deterministic.
            taps: layers whose output is returned as well, negative from the end.
            hidden: return every layer's output, [L, B, P, D] (inspection and parity).
        """
        cfg = self.cfg
        x = self.embed(images)
        if keep is not None:
            if random is None:
                raise ValueError("Token masking (keep) needs randomness: pass `random`.")
            kept = keep_tokens(x[:, 1:], keep, jax.random.fold_in(random.key, 0), random.example)
            x = jnp.concatenate([x[:, :1], kept], axis=1)

        dropping = cfg.drop_path > 0 or (bool(cfg.lora) and cfg.lora.dropout > 0)
        rates = jnp.asarray(cfg.drop_path_rates())
        layers = jnp.arange(cfg.depth)

        def call(
            block: Block, x: jax.Array, extra: Any, run: Run
        ) -> tuple[jax.Array, jax.Array | None]:
            index, rate = extra
            here = None
            if dropping and random is not None:
                here = random.fold(1 + index)
            rate = rate if cfg.drop_path else None
            x = run(block, lambda block, x: block(x, rate, here), x)
            return x, (x if hidden else None)

        x, outs, tapped = self.blocks(
            call,
            x,
            (layers, rates),
            remat=self.compute.remat,
            dtype=self.compute.jnp_dtype,
            head_multiple=self.compute.head_multiple,
            unroll=self.compute.unroll,
            taps=taps,
        )
        return VisionOutput(x, tapped, outs)
