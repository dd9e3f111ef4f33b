"""One update: what it changes, and what a bad one leaves as it was."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.models.definition import Definition
from internvl_jax.train.optimizer import OptimConfig, learning_rate, make_optimizer
from internvl_jax.train.step import initial_state, make_step, value_and_grad

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
KEY = jax.random.key(0)


class Loop:
    """The line's training, one call per batch."""

    def __init__(self, line, config: OptimConfig, **options):
        definition = Definition.of(line.build, line.trainable)
        values = {
            "kernel": jnp.asarray([[1.0, -1.0], [0.5, 2.0], [0.0, 1.0]]),
            "bias": jnp.asarray([0.1, -0.2]),
        }
        self.frozen = {"frozen": jnp.asarray([1.5, 0.5])}
        tx = make_optimizer(config, 10, values, line.lr_scale)
        self.state = initial_state(values, tx, config)
        self.update = jax.jit(
            make_step(line, definition, tx, config, learning_rate(config, 10), **options)
        )

    def __call__(self, x):
        self.state, metrics = self.update(self.state, self.frozen, {"x": jnp.asarray(x)}, KEY)
        return {k: float(v) for k, v in metrics.items()}


def copied(state):
    return jax.tree.map(jnp.copy, state)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_update_learns_only_what_is_trained(line):
    loop = Loop(line, OptimConfig(peak_lr=0.1))
    before = copied(loop.state)
    metrics = loop(X)
    assert loop(X)["loss"] < metrics["loss"]
    assert set(loop.state.params) == {"kernel", "bias"}
    assert int(loop.state.step) == 2
    assert not np.array_equal(loop.state.params["bias"], before.params["bias"])
    assert metrics["learning_rate"] == pytest.approx(0.1)
    # No gradient, no moments for what is frozen: two per trained parameter, and the counters.
    shapes = sorted(x.shape for x in jax.tree.leaves(loop.state.opt))
    assert [s for s in shapes if s] == [(2,), (2,), (3, 2), (3, 2)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_non_finite_step_changes_nothing_but_the_counters(line, bad):
    loop = Loop(line, OptimConfig(peak_lr=0.1, ema=0.9, clip_norm=1.0))
    loop(X)
    before = copied(loop.state)
    metrics = loop(np.where(np.arange(8)[:, None] == 3, np.float32(bad), X))
    after = copied(loop.state)
    for part in ("params", "opt", "ema", "norm_mean"):
        assert_same(getattr(after, part), getattr(before, part))
    assert (after.step, after.skipped, after.bad_streak) == (2, 1, 1)
    assert metrics["bad_streak"] == 1 and metrics["skipped"] == 1
    assert loop(X)["bad_streak"] == 0
    assert int(loop.state.skipped) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(copied(loop.state)))


def test_a_spike_is_skipped_and_the_mean_forgets_it(line):
    loop = Loop(line, OptimConfig(peak_lr=1e-3, spike_factor=3.0))
    norms = [loop(X)["grad_norm"] for _ in range(3)]
    before = copied(loop.state)
    assert before.norm_mean == pytest.approx(norms[0], rel=0.05)
    assert loop(X * 30)["skipped"] == 1
    after = copied(loop.state)
    assert_same(
        (after.params, after.opt, after.norm_mean), (before.params, before.opt, before.norm_mean)
    )
    assert loop(X)["bad_streak"] == 0


def test_the_first_step_is_never_a_spike(line):
    loop = Loop(line, OptimConfig(spike_factor=1.01))
    assert loop(X * 100)["skipped"] == 0


def test_the_moving_average(line):
    loop = Loop(line, OptimConfig(peak_lr=0.1, ema=0.75))
    expected = np.asarray(loop.state.params["kernel"])
    for _ in range(3):
        loop(X)
        expected = 0.75 * expected + 0.25 * np.asarray(loop.state.params["kernel"])
    np.testing.assert_allclose(loop.state.ema["kernel"], expected, rtol=1e-6)
    assert loop.state.ema.keys() == loop.state.params.keys()


def test_no_average_takes_no_memory(line):
    assert Loop(line, OptimConfig()).state.ema == {}


@pytest.mark.parametrize("options", [dict(accumulate=4), dict(accumulate=4, cached=True)])
def test_microbatches_give_the_whole_update(line, options):
    whole, parts = (
        Loop(line, OptimConfig(peak_lr=0.1)),
        Loop(line, OptimConfig(peak_lr=0.1), **options),
    )
    a, b = whole(X), parts(X)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(parts.state.params[name], whole.state.params[name], rtol=1e-5)


def test_gradient_caching_needs_embeddings():
    from internvl_jax.models.llama import LlamaConfig
    from internvl_jax.stages.language import LanguageStage

    small = LlamaConfig(vocab_size=8, width=4, depth=1, heads=1, mlp_dim=4)
    stage = LanguageStage(model=small)
    definition = Definition.of(stage.build, stage.trainable)
    with pytest.raises(ValueError, match="LanguageStage is not: use accumulate"):
        value_and_grad(stage, definition, 2, True)


def test_examples_are_numbered_over_the_global_batch(line):
    """What drop path and masks are keyed by: the place in the whole batch, in every microbatch."""
    seen = []

    class Spy(type(line)):
        def embed(self, model, batch, key):
            jax.debug.callback(lambda e: seen.append(tuple(e.tolist())), batch["example"])
            return super().embed(model, batch, key)

    loop = Loop(Spy(), OptimConfig(), accumulate=2)
    loop(X)
    jax.effects_barrier()
    assert {i for part in seen for i in part} == set(range(8))
    assert all(len(part) == 4 for part in seen)
