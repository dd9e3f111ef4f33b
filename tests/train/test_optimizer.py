"""AdamW against NumPy, the schedule's values, and which parameter learns how fast."""

from __future__ import annotations

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.models.definition import Definition
from internvl_jax.stages.registry import stage_from_config
from internvl_jax.train.experiment import resolve
from internvl_jax.train.optimizer import OptimConfig, learning_rate, make_optimizer

SHAPES = {
    "vision/blocks/layers/attn/qkv": (3, 4, 2),
    "vision/blocks/layers/norm1/scale": (3, 4),
    "vision/blocks/layers/ls1": (3, 4),
    "qllama/periods/layers/first/attn/q_bias": (2, 4),
    "qllama/embedding": (5, 4),
    "logit_scale": (),
}
DECAYED = {"vision/blocks/layers/attn/qkv", "qllama/embedding"}
CONFIG = OptimConfig(peak_lr=0.01, warmup=2.0, b1=0.9, b2=0.95, weight_decay=0.1, end_lr=0.1)


def tree(values):
    """{"a/b": x} as nested dicts."""
    result: dict = {}
    for path, value in values.items():
        *parents, last = path.split("/")
        node = result
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return result


def leaf(nested, path):
    for name in path.split("/"):
        nested = nested[name]
    return np.asarray(nested)


def scale(path, shape):
    """The first group learns at a tenth, the stacked one at another rate per layer."""
    if path.startswith("qllama"):
        return 0.1
    return np.array([0.25, 0.5, 1.0]) if "attn/qkv" in path else 1.0


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_three_steps_equal_numpy(clip):
    rng = np.random.default_rng(0)
    params = {p: rng.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}
    config = OptimConfig(**{**vars(CONFIG), "clip_norm": clip})
    tx = make_optimizer(config, 10, tree(params), scale)
    state, now = tx.init(tree(params)), jax.tree.map(jnp.asarray, tree(params))
    m = {p: np.zeros(s) for p, s in SHAPES.items()}
    v = {p: np.zeros(s) for p, s in SHAPES.items()}
    update = jax.jit(tx.update)
    for step in range(3):
        grads = {p: rng.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}
        updates, state = update(jax.tree.map(jnp.asarray, tree(grads)), state, now)
        now = jax.tree.map(jnp.add, now, updates)

        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
        factor = min(1.0, clip / norm) if clip else 1.0
        # Linear warm-up over two steps, then a cosine over the other eight down to a tenth.
        progress = max(step - 2, 0) / 8
        rate = (
            0.01 * min((step + 1) / 2, 1) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        )
        for path, p in params.items():
            g = grads[path] * factor
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.95 * v[path] + 0.05 * g**2
            first, second = m[path] / (1 - 0.9 ** (step + 1)), v[path] / (1 - 0.95 ** (step + 1))
            direction = first / (np.sqrt(second) + 1e-8) + 0.1 * p * (path in DECAYED)
            s = np.asarray(scale(path, p.shape))
            params[path] = p - rate * s.reshape(s.shape + (1,) * (p.ndim - s.ndim)) * direction
            np.testing.assert_allclose(leaf(now, path), params[path], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        # Steps 0, 4, 9, 10, 55, 100 of a run of 100.
        (dict(warmup=10.0), [0.1, 0.5, 1.0, 1.0, 0.5, 0.0]),
        (dict(warmup=0.1), [0.1, 0.5, 1.0, 1.0, 0.5, 0.0]),
        (dict(warmup=10.0, end_lr=0.2), [0.1, 0.5, 1.0, 1.0, 0.6, 0.2]),
        (dict(warmup=0.0, schedule="constant"), [1.0] * 6),
        (dict(warmup=10.0, schedule="constant"), [0.1, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_schedule(config, values):
    schedule = learning_rate(OptimConfig(peak_lr=2.0, **config), 100)
    got = [float(schedule(step)) for step in (0, 4, 9, 10, 55, 100)]
    np.testing.assert_allclose(got, [2 * v for v in values], atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(schedule="linear"), "schedule='linear': use cosine or constant"),
        (dict(ema=1.0), r"ema=1.0 must lie in \[0, 1\)"),
        (dict(mu_dtype="float16"), "mu_dtype='float16': use bfloat16 or float32"),
    ],
)
def test_impossible_settings(values, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)


def test_the_first_moment_may_rest_in_bfloat16():
    params = {"kernel": jnp.ones((2, 2))}
    state = make_optimizer(OptimConfig(mu_dtype="bfloat16"), 1, params, lambda p, s: 1.0).init(
        params
    )
    dtypes = {str(x.dtype) for x in jax.tree.leaves(state) if x.shape == (2, 2)}
    assert dtypes == {"bfloat16", "float32"}


def true_size(argument: str = ""):
    module = importlib.import_module("configs.stage2_generative")
    return resolve(module.get_config(argument)).stage


@pytest.mark.parametrize(
    ("path", "exponents"),
    [
        # decay^(count - 1 - id): ids i + 1 for layer i, 0 for embeddings, the last for heads;
        # the counts are 48 + 2 and 32 + 2.
        ("vision/blocks/layers/attn/qkv", range(48, 0, -1)),
        ("vision/patch/kernel", 49),
        ("vision/cls", 49),
        ("vision/pos", 49),
        ("clip_projector/q", 0),
        ("qllama/periods/layers/first/attn/q", range(32, 0, -2)),
        ("qllama/periods/layers/first/cross/norm2/scale", range(32, 0, -2)),
        ("qllama/periods/layers/rest/0/mlp/up", range(31, 0, -2)),
        ("qllama/embedding", 33),
        ("qllama/norm/scale", 0),
        ("clip_projector2/q", 0),
        ("itm_head", 0),
        ("text_projection", 0),
        ("query_tokens", 33),
        ("logit_scale", 33),
    ],
)
def test_layer_wise_decay_has_the_released_ids(path, exponents):
    stage = true_size("retrieval")
    expected = 0.9 ** np.asarray(exponents, np.float64)
    np.testing.assert_allclose(stage.lr_scale(path, ()), expected, rtol=1e-12)


def test_query_tokens_learn_at_three_percent():
    assert true_size("retrieval").lr_scale("query_tokens", ()) == pytest.approx(0.031, abs=2e-4)


def test_decay_of_a_tail():
    """Five layers in periods of three: the last two stand outside the scan."""
    stage = stage_from_config(
        dict(
            name="generative",
            layer_decay=0.5,
            model=dict(qllama=dict(depth=5, cross_frequency=3, vision_width=3200)),
        )
    )
    np.testing.assert_allclose(stage.lr_scale("qllama/periods/layers/first/attn/q", ()), [2**-5])
    np.testing.assert_allclose(stage.lr_scale("qllama/periods/layers/rest/1/attn/q", ()), [2**-3])
    assert stage.lr_scale("qllama/tail/first/attn/q", ()) == 2**-2
    assert stage.lr_scale("qllama/tail/rest/0/attn/q", ()) == 2**-1


def test_stage_2_trains_one_billion_of_fourteen():
    """Queries, cross-attention, second projector, matching head and temperature; nothing else."""
    stage = true_size()
    definition = Definition.of(stage.build, stage.trainable)
    trained = {
        p: v.get_value().shape for p, v in definition.variables.items() if stage.trainable(p)
    }
    sizes = {p: math.prod(s) for p, s in trained.items()}
    assert sum(sizes.values()) == 1_010_334_467
    assert sum(n for p, n in sizes.items() if "/cross/" in p) == 956_418_048
    rest = {p.split("/")[0] for p in sizes if "/cross/" not in p}
    assert rest == {"query_tokens", "clip_projector2", "itm_head", "itm_bias", "logit_scale"}
