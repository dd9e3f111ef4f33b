"""Exported folders of small random models, written as the exporter lays them out."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from internvl_jax.convert.formats import FORMATS, About
from internvl_jax.convert.key_maps import MODULES, ModelConfig, key_map
from internvl_jax.models.compute import Compute
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.llama import LlamaConfig

torch = pytest.importorskip("torch")
# Threads that wait for each other on a busy machine take longer than these small products.
torch.set_num_threads(1)

EXACT = Compute(dtype="float32", remat="none")
VIT = VitConfig(image_size=28, patch_size=7, width=24, depth=5, heads=3, mlp_dim=40)
LAYER_VIT = dataclasses.replace(VIT, norm="layer", qk_norm=False, qkv_bias=True)
LLAMA = LlamaConfig(vocab_size=60, width=16, depth=3, heads=4, mlp_dim=20)
QWEN = dataclasses.replace(LLAMA, kv_heads=2, qkv_bias=True, rope_theta=1e6)
QWEN3 = dataclasses.replace(
    LLAMA, kv_heads=1, head_dim=6, qk_norm=True, out_bias=True, tied_head=True
)
# Cross-attention in layers 0, 2 and 4 of 5: the tail is half a period.
QLLAMA = dataclasses.replace(LLAMA, depth=5, cross_frequency=2, vision_width=24, pad_id=0)


def drawn(cfg: ModelConfig, seed: int = 0) -> Any:
    """A model whose every parameter is drawn, norms and biases around one; no part is idle."""
    rng = np.random.default_rng(seed)
    graphdef, shapes = nnx.split(
        nnx.eval_shape(lambda: MODULES[type(cfg)](cfg, EXACT, rngs=nnx.Rngs(0)))
    )

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        x = rng.normal(size=leaf.shape) * 0.3 if leaf.ndim > 1 else rng.normal(1, 0.2, leaf.shape)
        return jnp.asarray(x, leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(draw, shapes))


def tensors(model: Any, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """What an export of a model holds."""
    keys = key_map(cfg, FORMATS["plain"].naming)
    flat = {"/".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(model))}
    return {name: keys.to_official(flat, name) for name in keys.entries}


def write(folder: Path, weights: dict[str, np.ndarray], about: About) -> Path:
    """An exported folder in two shards."""
    for name, content in FORMATS["plain"].files(about).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@dataclasses.dataclass
class Pair:
    """A model of ours, and the folder it was exported to."""

    cfg: Any
    ours: Any
    folder: Path

    def theirs(self, **options: Any) -> Any:
        """The runtime's model."""
        from internvl_jax.convert.runtime.load import load

        return load(self.folder, device="cpu", **options)[1]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Draws a model and exports it: config, seed, and what `About` shall say."""

    def make(cfg: ModelConfig, seed: int = 0, **about: Any) -> Pair:
        model = drawn(cfg, seed)
        folder = tmp_path_factory.mktemp("exported") / "model"
        return Pair(cfg, model, write(folder, tensors(model, cfg), About(cfg, **about)))

    return make


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of few pieces."""
    from data_pipelines.text import train

    words = ["a", "photo", "of", "cat", "dog", "red", "what", "is", "this", "Eine", "Katze", "猫"]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 6)) for _ in range(200)]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train(texts, path, vocab_size=330)
    return path


@pytest.fixture(scope="session")
def packed() -> ModuleType:
    """`tests/parity/packed_cases.py`, which restores the stored official cases."""
    path = Path(__file__).parents[2] / "parity" / "packed_cases.py"
    spec = importlib.util.spec_from_file_location("packed_cases", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def close(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Equal to a share of the largest magnitude."""
    expected = np.asarray(expected)
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(found), expected, atol=tolerance * scale, rtol=0)
