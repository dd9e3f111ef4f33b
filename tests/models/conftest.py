"""Models with weights that leave no part idle, in exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Any]:
    """Makes a model and draws every parameter: norms, biases and LayerScale included."""

    def draw(make: Callable[[nnx.Rngs], nnx.Module], seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        graphdef, shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

        def leaf(x: jax.ShapeDtypeStruct) -> jax.Array:
            value = rng.normal(size=x.shape) * (0.2 if x.ndim > 1 else 0.3)
            return jnp.asarray(value + (x.ndim < 2), x.dtype)

        return nnx.merge(graphdef, jax.tree.map(leaf, shapes))

    return draw
