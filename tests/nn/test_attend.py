"""Every implementation of attention against the plain one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.models.compute import Compute
from internvl_jax.nn.attend import Mask, attend
from internvl_jax.sharding.mesh import MeshConfig, make_mesh

slow = pytest.mark.slow
needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu comes with the `tpu` extra"
)


def draw(T: int, *, S: int | None = None, heads: int = 2, kv: int = 2, H: int = 128, B: int = 2):
    rng = np.random.default_rng(T)
    shapes = ((B, T, heads, H), (B, S or T, kv, H), (B, S or T, kv, H), (B, T, heads, H))
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def with_gradients(mask: Mask | jax.Array, how: str, real: jax.Array | None) -> Callable:
    """(q, k, v, dy) -> output and the gradients of q, k, v; rows of padding go unused."""

    def used(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        y = attend(q, k, v, mask, how)
        return y if real is None else jnp.where(real[:, :, None, None], y, 0)

    @jax.jit
    def run(q, k, v, dy):
        y, back = jax.vjp(used, q, k, v)
        return y, *back(dy)

    return run


def error(got: jax.Array, expected: jax.Array) -> float:
    """Largest difference, relative to the largest magnitude."""
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    assert np.isfinite(got).all()
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def padding(lengths: list[int], T: int, side: str) -> jax.Array:
    real = jnp.arange(T)[None] < jnp.asarray(lengths)[:, None]
    return real if side == "right" else real[:, ::-1]


@pytest.mark.parametrize(
    ("T", "causal", "side", "heads", "kv"),
    [
        (128, False, None, 2, 2),
        (130, False, None, 1, 1),  # two tokens more than a block
        (99, True, None, 2, 1),  # filled up, without segments
        (150, True, "right", 4, 2),
        (150, True, "left", 2, 2),
        (133, False, "right", 2, 1),
        (700, True, "right", 1, 1),  # two blocks: one of them is skipped
    ],
)
def test_splash_equals_einsum(T, causal, side, heads, kv):
    real = None if side is None else padding([T - 31, T], T, side)
    inputs, mask = draw(T, heads=heads, kv=kv), Mask(real, causal)
    plain, splash = (with_gradients(mask, how, real)(*inputs) for how in ("einsum", "splash"))
    for name, got, expected in zip(("y", "dq", "dk", "dv"), splash, plain, strict=True):
        assert error(got, expected) < 1e-5, name


def test_splash_keeps_the_texts_of_a_row_apart():
    T = 150
    text = jnp.asarray(np.repeat([[1, 2, 3, 0]], 2, 0).repeat([40, 60, 30, 20], axis=1), jnp.int32)
    inputs, mask = draw(T, heads=2, kv=1), Mask(text, causal=True)
    plain, splash = (with_gradients(mask, how, text > 0)(*inputs) for how in ("einsum", "splash"))
    for name, got, expected in zip(("y", "dq", "dk", "dv"), splash, plain, strict=True):
        assert error(got, expected) < 1e-5, name
    q, k, v, _ = inputs
    alone = attend(*(x[:, 40:100] for x in (q, k, v)), Mask(causal=True))
    np.testing.assert_allclose(attend(q, k, v, mask)[:, 40:100], alone, rtol=0, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_equals_einsum(causal, side):
    real = None if side is None else padding([219, 250], 250, side)
    inputs = [x.astype(jnp.bfloat16) for x in draw(250, heads=4, kv=2)]
    mask = Mask(real, causal)
    plain, cudnn = (with_gradients(mask, how, real)(*inputs) for how in ("einsum", "cudnn"))
    for name, got, expected in zip(("y", "dq", "dk", "dv"), cudnn, plain, strict=True):
        assert error(got, expected) < 2e-2, name


@pytest.mark.parametrize(("T", "size"), [(99, 1.0), (99, 4.0), (257, 1.0), (257, 4.0)])
def test_logits_resting_in_bfloat16(monkeypatch, T, size):
    """They add an error of the size that rounding q, k, v to bfloat16 brings; `size` sharpens."""
    q, k, v, dy = draw(T, heads=4, kv=4)
    exact = [q * size, k, v, dy]
    rounded = [x.astype(jnp.bfloat16) for x in exact]

    def run(short: int, inputs: list[jax.Array]) -> list[np.ndarray]:
        monkeypatch.setattr("internvl_jax.nn.attend.SHORT", short)
        return [np.asarray(x, np.float32) for x in with_gradients(Mask(), "einsum", None)(*inputs)]

    ours, plain = run(T, rounded), run(0, rounded)
    inputs, ideal = run(0, [x.astype(jnp.float32) for x in rounded]), run(0, exact)
    assert run(T, exact)[0].tobytes() == ideal[0].tobytes()  # float32 is left alone
    distance = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
    for name, a, b, c, d in zip(("y", "dq", "dk", "dv"), ours, plain, inputs, ideal, strict=True):
        assert 0 < distance(a, b) < 2 * distance(c, d), name
        assert distance(a, d) < 2 * distance(b, d), name


def choice(monkeypatch, platform: str, dtype: str, T: int, H: int) -> str:
    """Which implementation `auto` runs."""
    ran = []
    for name in ("_einsum", "_splash", "_cudnn", "short_attention"):
        record = lambda q, *_, name=name, **__: (ran.append(name.split("_")[name[0] == "_"]), q)[1]
        monkeypatch.setattr(f"internvl_jax.nn.attend.{name}", record)
    monkeypatch.setattr("internvl_jax.nn.attend.platform", lambda: platform)
    x = jnp.zeros((1, T, 1, H), dtype)
    attend(x, x, x, Mask(causal=True), "auto")
    return ran[0]


@pytest.mark.parametrize(
    ("platform", "dtype", "T", "H", "expected"),
    [
        ("cpu", "bfloat16", 2048, 128, "einsum"),
        ("tpu", "bfloat16", 2048, 128, "splash"),
        ("tpu", "bfloat16", 512, 128, "splash"),
        ("tpu", "bfloat16", 257, 128, "short"),
        ("tpu", "bfloat16", 301, 128, "einsum"),
        ("tpu", "bfloat16", 99, 64, "einsum"),
        ("tpu", "float32", 99, 128, "einsum"),
        ("tpu", "bfloat16", 2048, 64, "einsum"),
        ("tpu", "float32", 2048, 128, "einsum"),
        ("gpu", "bfloat16", 257, 64, "cudnn"),
        ("gpu", "bfloat16", 257, 160, "einsum"),
        ("gpu", "float32", 2048, 128, "einsum"),
    ],
)
def test_auto_goes_by_platform_length_and_dtype(monkeypatch, platform, dtype, T, H, expected):
    assert choice(monkeypatch, platform, dtype, T, H) == expected


@pytest.mark.parametrize("forced", ["short", "splash", "cudnn"])
def test_what_no_kernel_can_do_stays_plain(forced):
    """A mask that is an array, a cache, cross-attention."""
    q, k, v, _ = draw(5, S=7, H=8)
    allowed = jnp.ones((1, 5, 7), bool)
    np.testing.assert_array_equal(attend(q, k, v, allowed, forced), attend(q, k, v))
    np.testing.assert_array_equal(attend(q, k, v, implementation=forced), attend(q, k, v))
    with pytest.raises(ValueError, match="5 queries and 7 keys"):
        attend(q, k, v, Mask(causal=True), forced)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 2, 4)])
def test_splash_on_a_mesh_equals_one_device(sizes):
    """Rows and heads are split; what does not divide is computed by every device."""
    real = padding([77, 131, 110, 120], 131, "right")
    inputs, mask = draw(131, heads=4, kv=2, B=4), Mask(real, causal=True)
    expected = with_gradients(mask, "einsum", real)(*inputs)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
        got = with_gradients(mask, "splash", real)(*inputs)
    for name, a, b in zip(("y", "dq", "dk", "dv"), got, expected, strict=True):
        assert error(a, b) < 1e-5, name


def test_settings_are_checked():
    with pytest.raises(ValueError, match="attention is 'flash'"):
        Compute(attention="flash")
    with pytest.raises(ValueError, match="half precision"):
        Compute(attention="cudnn", dtype="float32")


PLAN = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from flax import nnx
from internvl_jax.models.compute import Compute
from internvl_jax.models.llama import Llama, LlamaConfig
from internvl_jax.models.qllama import causal_mask
from internvl_jax.sharding.mesh import MeshConfig, make_mesh
from internvl_jax.sharding.rules import batch_sharding

attention, remat = sys.argv[1:]
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = make_mesh(MeshConfig(1, 2, 2), topology.devices)
cfg = LlamaConfig(vocab_size=64, width=256, depth=2, heads=4, kv_heads=2, head_dim=128, mlp_dim=256)
compute = Compute(attention=attention, remat=remat)
graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(cfg, compute, rngs=nnx.Rngs(0))))

def loss(state, ids, real):
    model = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = model(model.embed(ids), positions, causal_mask(real)).hidden
    return jnp.sum(jnp.where(real[..., None], hidden, 0).astype(jnp.float32) ** 2)

like = lambda dtype: jax.ShapeDtypeStruct((4, 700), dtype, sharding=batch_sharding(mesh))
with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(loss)).lower(state, like(jnp.int32), like(bool))
print(lowered.compile().as_text())
"""


def planned(attention: str, remat: str) -> str:
    """HLO of a small decoder's gradient, compiled for absent TPUs by a process of its own."""
    ours = ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION")  # the tests', meant for CPUs
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    command = [sys.executable, "-c", PLAN, attention, remat]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_libtpu
@pytest.mark.parametrize(
    ("remat", "forward"), [("full", 2), ("attn", 1), pytest.param("none", 1, marks=slow)]
)
def test_splash_compiles_for_absent_tpus(remat, forward):
    """And what a policy saves under ``attn`` runs the forward kernel no second time."""
    hlo = planned("auto", remat)
    kernels = re.findall(r"%splash_mha_(fwd|dkv|dq)_\S+ = .* custom-call\(", hlo)
    assert sorted(kernels) == ["dkv", "dq", *["fwd"] * forward]
    assert not re.search(r"\[(\d+,)*7(00|68),7(00|68)\]", hlo)  # no logits


@slow
@needs_libtpu
def test_the_plan_sees_logits_where_there_are_some():
    assert re.search(r"\[(\d+,)*700,700\]", planned("einsum", "full"))
