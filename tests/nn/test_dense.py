"""The linear layer's product and its hand-written gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.nn.dense import dense

SHAPES = [
    ((6,), (6, 5), 1),
    ((3, 6), (6, 5), 1),
    ((2, 3, 6), (6, 4, 2), 1),
    ((2, 3, 4, 2), (4, 2, 6), 2),
]


@pytest.mark.parametrize(("x", "kernel", "contract"), SHAPES)
def test_product_and_gradients_are_tensordots(x, kernel, contract):
    x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate((x, kernel)))

    def loss(product):
        return lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel)))

    def ours(x, kernel):
        return dense(x, kernel, contract=contract)

    def plain(x, kernel):
        return jnp.tensordot(x, kernel, contract)

    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), rtol=1e-6)
    got = jax.jit(jax.grad(loss(ours), (0, 1)))(x, kernel)
    for mine, wanted in zip(got, jax.grad(loss(plain), (0, 1))(x, kernel), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)


def test_the_kernel_is_taken_in_the_dtype_of_the_rows():
    x, kernel = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5))
    dx, dkernel = jax.grad(lambda x, k: dense(x, k).astype(jnp.float32).sum(), (0, 1))(x, kernel)
    assert dense(x, kernel).dtype == dx.dtype == jnp.bfloat16
    assert dkernel.dtype == jnp.float32 and (dkernel == 6).all()


@pytest.mark.parametrize(("platform", "flat"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_rows_are_flattened_on_a_cpu_alone(platform, flat):
    grad = jax.jit(jax.grad(lambda k, x: dense(x, k).sum()))
    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 5), (2, 3, 4)))
    text = grad.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert ("contracting_dims = [0] x [0]" in text) == flat
    assert ("contracting_dims = [0, 1] x [0, 1]" in text) != flat
