"""Adapters: what they add, what training sees of them, and what they become when merged."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from internvl_jax.nn import lora as lora_module
from internvl_jax.nn.attend import Mask
from internvl_jax.nn.attention import CrossAttention, DecoderAttention, VitAttention
from internvl_jax.nn.lora import LoraConfig, adapters, merged
from internvl_jax.nn.mlp import Mlp, SwiGlu
from internvl_jax.nn.param import normal
from internvl_jax.nn.regularize import Randomness
from internvl_jax.nn.rope import rope_tables

LORA = LoraConfig(rank=3, alpha=5.0, dropout=0.0)
INIT: dict[str, Any] = dict(init=normal(0.3), out_init=normal(0.3))
ROPE = rope_tables(jnp.broadcast_to(jnp.arange(5), (4, 5)), 4, 1e4)
GAIN = jnp.linspace(-1, 2, 12)
DECODER = dict(qkv_bias=True, out_bias=True, qk_norm=True, eps=1e-6, **INIT)
X = jax.random.normal(jax.random.key(0), (4, 5, 12))
SEEN = jax.random.normal(jax.random.key(1), (2, 7, 8))

MODULES: dict[str, tuple[Any, Any]] = {
    "vit": (
        lambda r, lora: VitAttention(
            12, 3, qkv_bias=True, qk_norm=True, eps=1e-6, rngs=r, lora=lora, **INIT
        ),
        lambda m, x, random=None: m(x, GAIN, random),
    ),
    "mlp": (
        lambda r, lora: Mlp(12, 16, rngs=r, lora=lora),
        lambda m, x, random=None: m(x, GAIN, random),
    ),
    "swiglu": (
        lambda r, lora: SwiGlu(12, 16, rngs=r, lora=lora, **INIT),
        lambda m, x, random=None: m(x, random),
    ),
    "decoder": (
        lambda r, lora: DecoderAttention(12, 4, 2, 4, rngs=r, lora=lora, **DECODER),
        lambda m, x, random=None: m(x, ROPE, Mask(causal=True), random=random)[0],
    ),
    "cross": (
        lambda r, lora: CrossAttention(12, 4, 4, 8, eps=1e-6, rngs=r, lora=lora, **INIT),
        lambda m, x, random=None: m(x, SEEN, random),
    ),
}


def state_of(module: nnx.Module) -> dict[str, jax.Array]:
    flat = nnx.to_flat_state(nnx.state(module))
    return {"/".join(map(str, path)): v.get_value() for path, v in flat}


def with_state(module: nnx.Module, values: dict[str, jax.Array]) -> Any:
    graphdef, state = nnx.split(module)
    new = {
        path: v.replace(values["/".join(map(str, path))]) for path, v in nnx.to_flat_state(state)
    }
    return nnx.merge(graphdef, nnx.from_flat_state(new))


@pytest.fixture(params=MODULES)
def case(request, drawn):
    """A module with adapters that do something, without, and how it is called."""
    make, call = MODULES[request.param]
    return drawn(lambda r: make(r, LORA)), nnx.eval_shape(lambda: make(nnx.Rngs(0), None)), call


def merged_state(values: dict[str, jax.Array], scale: float = LORA.scale) -> dict[str, jax.Array]:
    plain = {path: x for path, x in values.items() if "_lora/" not in path}
    for kernel, (a, b) in adapters(values).items():
        plain[kernel] = merged(values[kernel], values[a], values[b], scale)
    return plain


def test_adapters_do_what_the_merged_kernels_do(case):
    module, bare, call = case
    values = state_of(module)
    assert adapters(values)
    got, wanted = call(module, X), call(with_state(bare, merged_state(values)), X)
    assert np.abs(wanted - call(with_state(bare, merged_state(values, 0.0)), X)).max() > 0.1
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_gradients_are_those_of_the_merged_kernels(case):
    """By the chain rule through ``kernel + scale * a b``, written with plain products."""
    module, bare, call = case
    values = state_of(module)
    trained = {path: x for path, x in values.items() if "_lora/" in path}
    loss = lambda module: jnp.sum(jnp.sin(call(module, X)))
    got = jax.grad(lambda t: loss(with_state(module, {**values, **t})))(trained)
    wanted = jax.grad(lambda t: loss(with_state(bare, merged_state({**values, **t}))))(trained)
    for path, gradient in got.items():
        largest = np.abs(wanted[path]).max()
        assert largest > 1e-3, path
        np.testing.assert_allclose(gradient, wanted[path], atol=1e-4 * largest, err_msg=path)


def test_the_gradient_of_a_frozen_kernel_is_never_formed(case):
    """No product of the backward pass has a kernel's shape, but where the kernels are trained."""
    module, _, call = case
    values = state_of(module)
    # Products of the activations have a multiple of the rows' number; no kernel here has.
    sizes = {values[kernel].size for kernel in adapters(values)}
    sizes = {size for size in sizes if size % (X.shape[0] * X.shape[1])}

    def products(trained: dict[str, jax.Array]) -> set[int]:
        frozen = {path: x for path, x in values.items() if path not in trained}
        loss = lambda t, f: jnp.sum(jnp.sin(call(with_state(module, {**f, **t}), X)))
        jaxpr = jax.make_jaxpr(jax.grad(loss))(trained, frozen).jaxpr
        names = [(e.primitive.name, e.outvars[0].aval) for e in every_equation(jaxpr)]
        return {aval.size for name, aval in names if name == "dot_general"}

    trained = {path: x for path, x in values.items() if "_lora/" in path}
    assert not sizes & products(trained)
    assert sizes & products(values)


def every_equation(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from every_equation(inner)


def test_fresh_adapters_change_nothing_and_are_drawn_as_peft_draws_them():
    make, call = MODULES["vit"]
    module = make(nnx.Rngs(0), LoraConfig(rank=200))
    values = state_of(module)
    assert {p: x.shape for p, x in values.items() if "_lora/" in p} == {
        "qkv_lora/a": (12, 200),
        "qkv_lora/b": (200, 3, 3, 4),
        "out_lora/a": (3, 4, 200),
        "out_lora/b": (200, 12),
    }
    bound = 12**-0.5
    assert np.abs(values["qkv_lora/a"]).max() <= bound
    assert values["qkv_lora/a"].std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not values["qkv_lora/b"].any() and not values["out_lora/b"].any()
    bare = with_state(make(nnx.Rngs(0), None), {p: values[p] for p in values if "_lora" not in p})
    np.testing.assert_array_equal(call(module, X), call(bare, X))


def test_axes_are_those_of_the_kernel_and_the_rank_is_whole():
    module = MODULES["vit"][0](nnx.Rngs(0), LORA)
    axes = {n: getattr(module.qkv_lora, n).get_metadata()["axes"] for n in "ab"}
    assert axes == {"a": ("embed", None), "b": (None, None, "vit_heads", "head_dim")}
    axes = {n: getattr(module.out_lora, n).get_metadata()["axes"] for n in "ab"}
    assert axes == {"a": ("vit_heads", "head_dim", None), "b": (None, "embed")}


RANDOM = Randomness(jax.random.key(3), jnp.arange(4))


@pytest.mark.parametrize("kind", MODULES)
def test_dropout_is_each_examples_own(drawn, kind):
    """Half of the batch draws what it drew in the whole; another step draws anew."""
    make, call = MODULES[kind]
    cfg = LoraConfig(rank=3, dropout=0.5)
    module = drawn(lambda r: make(r, cfg))
    whole = call(module, X, RANDOM)
    assert not np.allclose(whole, call(module, X))
    assert not np.allclose(whole, call(module, X, RANDOM.fold(1)))
    if kind not in ("cross", "decoder"):  # which are called with tables of all four rows
        half = call(module, X[2:], Randomness(RANDOM.key, jnp.arange(2, 4)))
        np.testing.assert_allclose(half, whole[2:], atol=1e-5)
    np.testing.assert_array_equal(call(module, X, RANDOM), whole)


def test_dropout_keeps_the_mean_and_does_not_see_padding(monkeypatch):
    seen = {}
    real = lora_module.dense

    def spy(x, kernel, contract=1):
        seen[x.shape] = x
        return real(x, kernel, contract=contract)

    monkeypatch.setattr(lora_module, "dense", spy)
    module = MODULES["vit"][0](nnx.Rngs(0), LoraConfig(rank=2, dropout=0.25)).out_lora
    x = jnp.ones((4, 500, 3, 4))
    module.down(x, RANDOM)
    alone = seen[x.shape]
    assert set(np.unique(alone)) == {0.0, np.float32(1 / 0.75)}
    assert np.mean(alone == 0) == pytest.approx(0.25, abs=0.01)
    module.a = nnx.Param(jnp.zeros((4, 4, 2)))
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0)))
    module.down(padded, RANDOM)
    np.testing.assert_array_equal(seen[padded.shape][:, :, :3], alone)
    assert not seen[padded.shape][:, :, 3].any()


def test_merging_is_float32_and_keeps_dtype_and_kind():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(6, 2, 4)).astype(ml_dtypes.bfloat16)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((6, 3), (3, 2, 4)))
    exact = kernel.astype(np.float64) + 0.5 * np.tensordot(a, b, 1)
    got = merged(kernel, a, b, 0.5)
    assert isinstance(got, np.ndarray) and got.dtype == kernel.dtype
    np.testing.assert_array_equal(got, exact.astype(ml_dtypes.bfloat16))
    on_device = merged(*(jnp.asarray(w) for w in (kernel, a, b)), 0.5)
    assert isinstance(on_device, jax.Array) and on_device.dtype == jnp.bfloat16
    np.testing.assert_array_equal(on_device, got)


def test_targets_choose_and_rank_zero_has_none():
    make, _ = MODULES["swiglu"]
    chosen = state_of(make(nnx.Rngs(0), LoraConfig(targets=("mlp/up",))))
    assert set(adapters(chosen)) == {"up"}
    assert not adapters(state_of(make(nnx.Rngs(0), LoraConfig(rank=0))))
    assert LoraConfig(rank=8).scale == 2 and LoraConfig(rank=8, alpha=4).scale == 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"rank": -1}, "rank=-1"), ({"dropout": 1.0}, r"dropout=1.0 .*\[0, 1\)")],
)
def test_what_cannot_be_is_said(settings, words):
    with pytest.raises(ValueError, match=words):
        LoraConfig(**settings)
