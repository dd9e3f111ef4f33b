"""The scanned stack equals its layers one after another, however it is rematerialised."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvl_jax.nn.mlp import Mlp
from internvl_jax.nn.norm import RMSNorm
from internvl_jax.nn.param import normal, param
from internvl_jax.nn.stack import Stack, parse_remat


class Layer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.mlp = Mlp(6, 12, rngs=rngs, init=normal(0.5))
        self.heads = param(rngs, (6, 5, 2), ("embed", "vit_heads", "head_dim"), normal(0.5))
        self.norm = RMSNorm((5, 2), eps=1e-6, axes=("vit_heads", "head_dim"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(jnp.einsum("BD,DNH->BNH", x, self.heads[...]))
        return x + self.mlp(x) + jnp.einsum("BNH,DNH->BD", y, self.heads[...])


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(Layer, 4, rngs=nnx.Rngs(0))


X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
GAINS = jnp.arange(1.0, 5.0)


def run(stack, **options):
    def one(layer, x):
        assert options.get("head_multiple", 1) == 1 or layer.heads.shape[1] == 8
        return layer(x)

    def call(layer, x, gain, run):
        return run(layer, one, x) * gain, jnp.sum(x)

    return stack(call, X, GAINS, **options)


def unrolled(stack):
    outs, x = [], X
    for i in range(4):
        x = stack.layer(i)(x) * GAINS[i]
        outs.append(x)
    return outs


def test_layers_differ(stack):
    kernel = stack.layers.mlp.fc1[...]
    assert kernel.shape == (4, 6, 12)
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.1


def test_scan_equals_the_layers_in_turn(stack):
    outs = unrolled(stack)
    x, sums, tapped = run(stack, taps=(-4, 2))
    np.testing.assert_allclose(x, outs[-1], rtol=1e-5)
    np.testing.assert_allclose(sums, [jnp.sum(t) for t in [X, *outs[:-1]]], rtol=1e-4)
    np.testing.assert_allclose(tapped[0], outs[0], rtol=1e-5)
    np.testing.assert_allclose(tapped[1], outs[2], rtol=1e-5)


def test_padded_heads_change_nothing(stack):
    x, _, _ = run(stack)
    padded, _, _ = run(stack, head_multiple=4)
    np.testing.assert_allclose(padded, x, rtol=1e-5)
    assert stack.layers.heads.shape == (4, 6, 5, 2)


@pytest.mark.parametrize(
    "remat", ["full", "fc1", "qkv,attn,fc1", "fc1:2", "fc1:3,attn:1", "layer@host,fc1"]
)
def test_remat_changes_neither_value_nor_gradient(stack, remat):
    graphdef, state = nnx.split(stack)

    def loss(state, remat):
        return jnp.sum(run(nnx.merge(graphdef, state), remat=remat)[0] ** 2)

    value, grads = jax.value_and_grad(loss)(state, "none")
    other, again = jax.value_and_grad(loss)(state, remat)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_remat_keeps_fewer_activations(stack):
    """`full` recomputes a layer in the backward pass; naming its activation keeps it."""
    graphdef, state = nnx.split(stack)

    def products(remat: str) -> int:
        def loss(state):
            return jnp.sum(run(nnx.merge(graphdef, state), remat=remat)[0])

        return str(jax.make_jaxpr(jax.grad(loss))(state)).count("dot_general")

    assert products("full") > products("none")
    assert products("full") > products("fc1") >= products("none")


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="Unknown activation 'fc2' in remat='fc1,fc2'"):
        parse_remat("fc1,fc2")


def test_matrices_are_cast_vectors_are_not(stack):
    seen = {}

    def one(layer, x):
        seen.update(matrix=layer.mlp.fc1.dtype, vector=layer.mlp.fc1_bias.dtype)
        return x

    stack(lambda layer, x, gain, run: (run(layer, one, x), None), X, GAINS, dtype=jnp.bfloat16)
    assert seen == {"matrix": jnp.bfloat16, "vector": jnp.float32}
