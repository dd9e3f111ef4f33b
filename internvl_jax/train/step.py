"""One jitted, sharded, donated update for any stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Format, Layout

from internvl_jax.chips import compiler_options
from internvl_jax.models.definition import Definition, Tree
from internvl_jax.stages.stage import Batch, Metrics, Stage
from internvl_jax.train import grad_cache, microbatch
from internvl_jax.train.experiment import Experiment
from internvl_jax.train.optimizer import OptimConfig, learning_rate
from internvl_jax.tree import flatten, like

Leaf = Any
"""An array, or its shape, dtype and sharding before it exists."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that changes from step to step, and that a checkpoint holds.

    Attributes:
        step: int32, number of the next update.
        params: trained parameters.
        opt: optimizer state.
        ema: moving average of params, empty where it is off.
        norm_mean: running mean of the gradient norm, for the spike guard; 0 before the first step.
        skipped: int32, updates skipped so far.
        bad_streak: int32, updates skipped in a row.
    """

    step: Leaf
    params: Tree
    opt: Any
    ema: Tree
    norm_mean: Leaf
    skipped: Leaf
    bad_streak: Leaf


def initial_state(
    params: Tree, tx: optax.GradientTransformation, config: OptimConfig
) -> TrainState:
    """The state before the first update (traced under jit so that it is created on its shards)."""
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, params) if config.ema else {}
    return TrainState(zero, params, tx.init(params), ema, jnp.zeros(()), zero, zero)


def value_and_grad(
    stage: Stage, definition: Definition, accumulate: int, cached: bool
) -> Callable[[Tree, Tree, Batch, jax.Array], tuple[jax.Array, Metrics, Tree]]:
    """(params, frozen, batch, key) -> loss, metrics, gradients, in one of three ways.

    Plain; accumulated over microbatches, weighted so that the sum is the whole batch's mean; or
    gradient-cached (`grad_cache`), where the loss sees the whole batch's embeddings at once.
    """

    def loss(params: Tree, frozen: Tree, batch: Batch, key: jax.Array):
        return stage.loss(definition.merge(params, frozen), batch, key)

    def plain(params, frozen, batch, key):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, frozen, batch, key)
        return value, metrics, grads

    def accumulated(params, frozen, batch, key):
        parts = microbatch.split(batch, accumulate)
        weights = jax.vmap(stage.weight)(parts)
        weights = weights / jnp.maximum(jnp.sum(weights), 1e-9)

        def body(total, inputs):
            part, weight = inputs
            new = plain(params, frozen, part, key)
            return jax.tree.map(lambda t, x: t + weight * x, total, new), None

        shapes = jax.eval_shape(plain, params, frozen, jax.tree.map(lambda x: x[0], parts), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(body, zeros, (parts, weights))
        return total

    if accumulate == 1:
        return plain
    if cached:
        return grad_cache.value_and_grad(stage, definition, accumulate)
    return accumulated


def make_step(
    stage: Stage,
    definition: Definition,
    tx: optax.GradientTransformation,
    config: OptimConfig,
    schedule: Callable[[Any], jax.Array],
    *,
    accumulate: int = 1,
    cached: bool = False,
) -> Callable[[TrainState, Tree, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """The update: (state, frozen, batch, seed key) -> (state, metrics).

    A step with a non-finite loss or gradient, or with a spiking gradient norm, changes nothing but
    the counters. The decision is made here, on global values, so all hosts agree.
    """
    gradients = value_and_grad(stage, definition, accumulate, cached)

    def step(state: TrainState, frozen: Tree, batch: Batch, key: jax.Array):
        size = next(iter(batch.values())).shape[0]
        batch = {**batch, "example": jnp.arange(size, dtype=jnp.int32)}
        loss, metrics, grads = gradients(
            state.params, frozen, batch, jax.random.fold_in(key, state.step)
        )
        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        if config.spike_factor:
            ok &= (state.norm_mean == 0) | (norm < config.spike_factor * state.norm_mean)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = jax.tree.map(
            lambda e, p: config.ema * e + (1 - config.ema) * p,
            state.ema,
            params if config.ema else {},
        )
        mean = jnp.where(state.norm_mean == 0, norm, 0.99 * state.norm_mean + 0.01 * norm)
        params, opt, ema, mean = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old),
            (params, opt, ema, mean),
            (state.params, state.opt, state.ema, state.norm_mean),
        )
        bad = jnp.where(ok, 0, 1).astype(jnp.int32)
        new = TrainState(
            state.step + 1,
            params,
            opt,
            ema,
            mean,
            state.skipped + bad,
            (state.bad_streak + 1) * bad,
        )
        metrics = {
            **metrics,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": schedule(state.step),
            "skipped": new.skipped,
            "bad_streak": new.bad_streak,
        }
        return new, metrics

    return step


def jit_step(
    experiment: Experiment,
    stage: Stage,
    definition: Definition,
    tx: optax.GradientTransformation,
    state: TrainState,
    frozen: Tree,
) -> jax.stages.Wrapped:
    """The update of one phase as it is compiled, in training and ahead of it (`plan`).

    Args:
        experiment: the run.
        stage: the phase's.
        definition: of the stage's model.
        tx: the optimizer.
        state: arrays, or shapes with shardings; the update's result is placed alike.
        frozen: likewise. Where their layout is left to the compiler (`TrainConfig.frozen_layout`),
            the result has to go through `settle`.
    """
    settings = experiment.train
    step = make_step(
        stage,
        definition,
        tx,
        experiment.optim,
        learning_rate(experiment.optim, settings.steps),
        accumulate=settings.accumulate,
        cached=settings.grad_cache,
    )
    placed = jax.tree.map(lambda x: x.sharding, state)
    (device, *_) = jax.tree.leaves(placed)[0].device_set
    options = {}
    if settings.frozen_layout == "auto":
        auto = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), frozen)
        options["in_shardings"] = (placed, auto, None, None)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(placed, None),
        compiler_options=compiler_options(device.device_kind) | settings.compiler_options,
        **options,
    )


def settle(
    step: jax.stages.Wrapped,
    state: TrainState,
    frozen: Tree,
    batch: dict[str, jax.ShapeDtypeStruct],
    key: jax.Array,
) -> tuple[jax.stages.Compiled, Tree]:
    """Compiles an update of `jit_step` and lays the frozen parameters out as it reads them.

    In the default layout a TPU copies what attention projects with, as whole stacks of layers:
    gigabytes beside the parameters themselves.

    Args:
        step: with ``frozen_layout="auto"``.
        state, key: as in each call.
        frozen: arrays; each is given up for its new copy.
        batch: its shapes, with shardings.

    Returns:
        The compiled update, and the frozen parameters for it.
    """
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    compiled = step.lower(state, jax.tree.map(shape, frozen), batch, key).compile()
    formats = flatten(compiled.input_formats[0][1])
    moved = {p: jax.device_put(x, formats[p], donate=True) for p, x in flatten(frozen).items()}
    return compiled, like(frozen, moved)
