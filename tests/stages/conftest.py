"""Small stages with drawn parameters, and what their losses are of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.models.compute import Compute
from internvl_jax.models.definition import Definition
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.stages.stage import Stage
from internvl_jax.tree import unflatten

VISION = VitConfig(
    image_size=16, patch_size=8, width=12, depth=1, heads=2, mlp_dim=16, drop_path=0.4
)
TEXT = LlamaConfig(vocab_size=30, width=16, depth=2, heads=4, mlp_dim=24, pad_id=0)
QLLAMA = LlamaConfig(**{**vars(TEXT), "cross_frequency": 2, "vision_width": 12})


@pytest.fixture(scope="session")
def parts() -> dict[str, Any]:
    """What stages of a test are put together from."""
    heads = dict(embed_dim=8, pool_heads=2)
    return dict(
        compute=Compute(dtype="float32", remat="none"),
        vision=VISION,
        text=TEXT,
        contrastive=InternVLConfig(vision=VISION, qllama=TEXT, queries=0, **heads),
        generative=InternVLConfig(vision=VISION, qllama=QLLAMA, queries=3, **heads),
    )


@pytest.fixture(scope="session")
def model_of() -> Callable[[Stage], Any]:
    """A stage's model with every parameter drawn."""

    def make(stage: Stage) -> Any:
        definition = Definition.of(stage.build, stage.trainable)
        rng = np.random.default_rng(0)
        flat = {}
        for path, variable in definition.variables.items():
            shape = variable.get_value().shape
            flat[path] = jnp.asarray(rng.normal(size=shape) * 0.4 + (len(shape) < 2), jnp.float32)
        return definition.merge(unflatten(flat))

    return make


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., dict[str, jax.Array]]:
    """Random arrays of a stage's batch, texts of different lengths."""

    def make(stage: Stage, size: int, **replace: Any) -> dict[str, jax.Array]:
        rng = np.random.default_rng(1)
        batch: dict[str, Any] = {}
        for name, spec in stage.batch_spec(size).items():
            if spec.dtype == np.uint8:
                batch[name] = rng.integers(0, 256, spec.shape).astype(np.uint8)
            elif name.endswith("mask"):
                lengths = rng.integers(3, spec.shape[1] + 1, (size, 1))
                batch[name] = np.arange(spec.shape[1]) < lengths
            elif name == "labels":
                batch[name] = np.where(rng.random(spec.shape) < 0.5, batch["text"], -100)
            else:
                batch[name] = rng.integers(1, 30, spec.shape)
        batch |= {"example": np.arange(size), **replace}
        exact = {"image": jnp.uint8, "labels": jnp.int32}
        return {
            k: jnp.asarray(v, jnp.bool_ if k.endswith("mask") else exact.get(k, jnp.int32))
            for k, v in batch.items()
        }

    return make
