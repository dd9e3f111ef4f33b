"""AdamW with per-parameter learning rates, from a config."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from internvl_jax.models.definition import Tree
from internvl_jax.tree import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule.

    Attributes:
        peak_lr: learning rate after the warm-up; a stage's groups scale it per parameter.
        warmup: steps of linear warm-up; a fraction below 1 is taken of the run's steps.
        schedule: ``cosine`` or ``constant``.
        end_lr: what the cosine ends at, as a fraction of the peak (the paper gives none: 0).
        b1, b2, eps, weight_decay: AdamW.
        no_decay: regular expressions of paths without weight decay.
        clip_norm: global-norm clipping; 0 is off.
        mu_dtype: dtype of the first moment.
        ema: decay of an exponential moving average of the trained parameters; 0 is off.
        spike_factor: a step whose gradient norm exceeds so many times its running mean is skipped;
            0 is off.
        max_bad_steps: the run stops after so many skipped steps in a row.
    """

    peak_lr: float = 1e-3
    warmup: float = 0.0
    schedule: str = "cosine"
    end_lr: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = (r"bias$", r"scale$", r"/ls[12]$")
    clip_norm: float = 0.0
    mu_dtype: str = "float32"
    ema: float = 0.0
    spike_factor: float = 0.0
    max_bad_steps: int = 20

    def __post_init__(self):
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule={self.schedule!r}: use cosine or constant.")
        if self.mu_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"mu_dtype={self.mu_dtype!r}: use bfloat16 or float32.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must lie in [0, 1).")


def learning_rate(config: OptimConfig, steps: int) -> Callable[[Any], jax.Array]:
    """The schedule: step -> learning rate."""
    warmup = round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    decay = max(steps - warmup, 1)

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum((step + 1) / max(warmup, 1), 1.0) if warmup else 1.0
        if config.schedule == "constant":
            return config.peak_lr * ramp * jnp.ones(())
        progress = jnp.clip((step - warmup) / decay, 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return config.peak_lr * ramp * (config.end_lr + (1 - config.end_lr) * cosine)

    return schedule


def make_optimizer(
    config: OptimConfig,
    steps: int,
    params: Tree,
    lr_scale: Callable[[str, tuple[int, ...]], float | np.ndarray],
) -> optax.GradientTransformation:
    """AdamW over a nested dict of parameters.

    Args:
        config: hyper-parameters.
        steps: length of the run, for the schedule.
        params: the trained parameters (shapes suffice).
        lr_scale: path and shape -> factor on the learning rate; an array broadcasts from the
            leading (layer) axis, so layer-wise decay is data, not labels.
    """
    flat = flatten(params)
    decays = unflatten({p: not any(re.search(r, p) for r in config.no_decay) for p in flat})
    scales = {p: lr_scale(p, tuple(x.shape)) for p, x in flat.items()}

    def rescale(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        scaled = {
            p: u
            * jnp.asarray(scales[p], u.dtype).reshape(
                np.shape(scales[p]) + (1,) * (u.ndim - np.ndim(scales[p]))
            )
            for p, u in flatten(updates).items()
        }
        return unflatten(scaled), state

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.dtype(config.mu_dtype)),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.GradientTransformation(lambda params: optax.EmptyState(), rescale),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )
