"""The kernels for short rows against plain attention, interpreted; and their compilation."""

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
from jax import lax

from internvl_jax.nn.attend import Mask, attend
from internvl_jax.nn.rope import rope_tables
from internvl_jax.nn.short_attention import fill, halves, joined
from internvl_jax.plan.hlo import parse
from internvl_jax.plan.kernels import kernel_flops
from internvl_jax.plan.roofline import Rates, roofline
from internvl_jax.sharding.mesh import MeshConfig, make_mesh

slow = pytest.mark.slow
NAMES = ("y", "dq", "dk", "dv")


def draw(B: int, T: int, N: int) -> list[jax.Array]:
    rng = np.random.default_rng(T)
    return [jnp.asarray(rng.normal(size=(B, T, N, 128)), jnp.float32) for _ in range(4)]


def padding(lengths: list[int], T: int, side: str) -> jax.Array:
    real = jnp.arange(T)[None] < jnp.asarray(lengths)[:, None]
    return real if side == "right" else real[:, ::-1]


def run(how: str, inputs: list[jax.Array], mask: Mask, rope=None) -> tuple[jax.Array, ...]:
    """Output and the gradients of q, k, v; rows of padding go unused."""

    @jax.jit
    def both(q, k, v, dy):
        y, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask, how, rope), q, k, v)
        dy = dy if mask.keys is None else jnp.where(mask.keys[:, :, None, None], dy, 0)
        return (y if mask.keys is None else jnp.where(mask.keys[:, :, None, None], y, 0), *back(dy))

    return both(*inputs)


def error(got: jax.Array, expected: jax.Array) -> float:
    """Largest difference, relative to the largest magnitude."""
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    assert np.isfinite(got).all()
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("T", "causal", "side", "heads"),
    [
        (99, False, None, 5),
        (80, True, "right", 2),
        (33, True, "left", 4),
        (13, True, None, 1),
        (130, False, "right", 1),
        pytest.param(257, False, None, 1, marks=slow),
        pytest.param(257, True, "left", 1, marks=slow),
    ],
)
def test_equals_einsum(T, causal, side, heads):
    mask = Mask(None if side is None else padding([T - T // 3, T], T, side), causal)
    inputs = draw(2, T, heads)
    got, expected = (run(how, inputs, mask) for how in ("short", "einsum"))
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert error(a, b) < 1e-5, name


@pytest.mark.parametrize(("T", "side"), [(80, "right"), (99, "left")])
def test_rotates_as_rope_does(T, side):
    mask, inputs = Mask(padding([T - 20, T], T, side), causal=True), draw(2, T, 2)
    positions = jnp.arange(T) + jnp.asarray([[3], [0]])
    rope = rope_tables(positions, 128, 10000.0)
    got, expected = (run(how, inputs, mask, rope) for how in ("short", "einsum"))
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert error(a, b) < 1e-5, name
    assert error(got[0], run("einsum", inputs, mask)[0]) > 0.1
    # Tables of one row serve all of them.
    one = rope_tables(jnp.arange(T)[None], 128, 10000.0)
    each = rope_tables(jnp.broadcast_to(jnp.arange(T), (2, T)), 128, 10000.0)
    np.testing.assert_array_equal(
        run("short", inputs, mask, one)[0], run("short", inputs, mask, each)[0]
    )


def test_more_rows_than_a_block():
    inputs = draw(19, 20, 1)
    got, expected = (run(how, inputs, Mask(causal=True)) for how in ("short", "einsum"))
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert error(a, b) < 1e-5, name


def test_a_row_without_keys_attends_uniformly_without_gradient():
    q, k, v, dy = draw(2, 20, 1)
    mask = Mask(padding([0, 20], 20, "right"))
    y, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask, "short"), q, k, v)
    np.testing.assert_allclose(y[0], jnp.broadcast_to(v[0].mean(0), v[0].shape), atol=1e-5)
    dq, dk, _ = back(dy)
    assert not dq[0].any() and not dk[0].any()
    assert dq[1].any() and dk[1].any()


@pytest.mark.parametrize("T", [80, 99])
def test_bfloat16_is_as_accurate_as_einsum(T):
    rounded = [x.astype(jnp.bfloat16) for x in draw(4, T, 2)]
    exact = run("einsum", [x.astype(jnp.float32) for x in rounded], Mask(causal=True))
    short, plain = (run(how, rounded, Mask(causal=True)) for how in ("short", "einsum"))
    distance = lambda a, b: float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
    for name, a, b, c in zip(NAMES, short, plain, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert 0 < distance(a, c) <= 1.02 * distance(b, c), name


def test_words_are_pairs_of_rows():
    """What only compiled kernels do: a word holds an even row in its low half, as in memory."""
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 128)), jnp.bfloat16)
    words = lax.bitcast_convert_type(jnp.moveaxis(rows, 0, -1), jnp.uint32)
    for row, half in zip(rows, halves(words), strict=True):
        np.testing.assert_array_equal(half, row.astype(jnp.float32))
    np.testing.assert_array_equal(joined(*rows.astype(jnp.float32)), words)


def test_tokens_fill_tiles():
    assert [fill(T) for T in (80, 99, 128, 257)] == [(80, 128), (112, 128), (128, 128), (272, 384)]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 2, 4)])
def test_on_a_mesh_equals_one_device(sizes):
    """Rows and heads are split; what does not divide is computed by every device."""
    mask, inputs = Mask(padding([17, 31, 10, 20], 31, "right"), causal=True), draw(4, 31, 4)
    rope = rope_tables(jnp.arange(31)[None], 128, 10000.0)
    expected = run("einsum", inputs, mask, rope)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
        got = run("short", inputs, mask, rope)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert error(a, b) < 1e-5, name


# ---- compiled for absent TPUs

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

name, remat, rows, T = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
mesh = make_mesh(MeshConfig(1, 2, 2), topologies.get_topology_desc(name, "tpu").devices[:4])
cfg = LlamaConfig(vocab_size=64, width=512, depth=2, heads=4, kv_heads=4, head_dim=128, mlp_dim=512)
compute = Compute(remat=remat)
graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(cfg, compute, rngs=nnx.Rngs(0))))

def loss(state, ids, real):
    model = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = model(model.embed(ids), positions, causal_mask(real)).hidden
    return jnp.sum(jnp.where(real[..., None], hidden, 0).astype(jnp.float32) ** 2)

like = lambda dtype: jax.ShapeDtypeStruct((rows, T), dtype, sharding=batch_sharding(mesh))
with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(loss)).lower(state, like(jnp.int32), like(bool))
print(lowered.compile().as_text())
"""


@pytest.fixture
def planned() -> Callable[..., str]:
    """HLO of a small decoder's gradient, compiled by a process of its own."""
    if find_spec("libtpu") is None:
        pytest.skip("libtpu comes with the `tpu` extra")

    def compiled(*arguments: object) -> str:
        ours = ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION")  # the tests', meant for CPUs
        env = {name: value for name, value in os.environ.items() if name not in ours}
        env |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        env |= {"TPU_SKIP_MDS_QUERY": "1"}
        command = [sys.executable, "-c", PLAN, *map(str, arguments)]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return compiled


@pytest.mark.parametrize(
    ("topology", "remat", "T", "forward"),
    [
        ("v5e:2x2", "full", 80, 2),
        pytest.param("v6e:2x2", "attn", 80, 1, marks=slow),
        pytest.param("v5p:2x2x1", "full", 99, 2, marks=slow),
    ],
)
def test_compiles_without_logits_or_copies(planned, topology, remat, T, forward):
    """And what a policy saves under ``attn`` runs the forward kernel no second time."""
    rows = 512
    text = planned(topology, remat, rows, T)
    kernels = re.findall(r"%short_attention_(\w+?)[.\d]* = .* custom-call\(", text)
    assert sorted(kernels) == ["backward", *["forward"] * forward]
    assert not re.search(rf"\[(\d+,)*{T},{T}\]", text)  # no logits
    # q, k, v and o come from the projections as the kernels want them, and go as they leave them.
    module = parse(text)
    fused = {n for c in module.computations.values() for op in c.ops for n in op.called("calls")}
    whole = {(256, T, 2, 128), (T, 2, 256, 128), (256, T, 256)}
    moved = [
        op
        for computation in module.computations.values()
        if computation.name not in fused
        for op in computation.ops
        if op.opcode in ("copy", "transpose", "reshape") and op.shapes[0].dims in whole
    ]
    assert not moved


def test_the_plan_counts_the_kernels_flops(planned):
    T, rows = 80, 64
    module = parse(planned("v5e:2x2", "attn", rows, T))
    found = roofline(module, Rates(flops=197e12, hbm=819e9, ici=90e9), kernel_flops)
    product = 2 * (rows // 2) * (4 // 2) * 80 * 128 * 128  # 80 queries, keys filled to 128
    layers = 2
    assert found.kernel_flops == {
        "short_attention_forward": layers * 2 * product,
        "short_attention_backward": layers * 5 * product,
    }


@pytest.mark.skipif(jax.default_backend() != "tpu", reason="the kernels' word access needs a TPU")
@pytest.mark.parametrize("T", [80, 99, 257])
def test_on_a_tpu_the_kernels_equal_plain_attention(T):
    """The interpreter takes rows out by index; only here do the strided words run."""
    inputs = [x.astype(jnp.bfloat16) for x in draw(32, T, 2)]
    mask = Mask(padding([T - i % 9 for i in range(32)], T, "right"), causal=T == 80)
    exact = run("einsum", [x.astype(jnp.float32) for x in inputs], mask)
    with jax.default_matmul_precision("default"):  # bfloat16 has no higher one in a kernel
        short, products = (run(how, inputs, mask) for how in ("short", "einsum"))
    for got, plain, true in zip(short, products, exact, strict=True):
        assert error(got, true) < 1.1 * error(plain, true) + 1e-3
