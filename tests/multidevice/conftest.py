"""Tiny stages whose loss and gradients are computed on any mesh of the eight CPU devices.

Everything that could tell meshes apart is on: an odd number of vision heads, drop path, token
masking, grouped queries, a period of layers with a tail, rematerialisation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from internvl_jax.batch import IMAGE_TOKEN
from internvl_jax.models.compute import Compute
from internvl_jax.models.definition import Definition
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.nn.lora import LoraConfig
from internvl_jax.sharding.mesh import MeshConfig, make_mesh
from internvl_jax.sharding.rules import batch_sharding
from internvl_jax.stages.contrastive import ContrastiveStage
from internvl_jax.stages.finetune import FinetuneStage
from internvl_jax.stages.generative import GenerativeStage
from internvl_jax.stages.language import LanguageStage
from internvl_jax.stages.stage import Stage
from internvl_jax.train.experiment import Experiment, TrainConfig
from internvl_jax.train.step import value_and_grad
from internvl_jax.tree import flatten, unflatten

EXACT = Compute(dtype="float32", remat="full")
VISION = VitConfig(
    image_size=32, patch_size=8, width=40, depth=2, heads=5, mlp_dim=48, drop_path=0.3
)
TEXT = LlamaConfig(
    vocab_size=50, width=32, depth=3, heads=4, mlp_dim=48, cross_frequency=2, pad_id=0
)
QLLAMA = dataclasses.replace(TEXT, vision_width=40)
LLM = LlamaConfig(vocab_size=50, width=64, depth=1, heads=8, kv_heads=4, mlp_dim=48)
HEADS = dict(embed_dim=16, pool_heads=4)
C = InternVLConfig(vision=VISION, qllama=TEXT, queries=0, **HEADS)
G = InternVLConfig(vision=VISION, qllama=QLLAMA, queries=3, **HEADS)
SIZES = dict(compute=EXACT, text_length=6)

STAGES: dict[str, Stage] = {
    "softmax": ContrastiveStage(
        model=C, image_size=24, keep=0.5, chunk=8, label_smoothing=0.1, **SIZES
    ),
    "sigmoid": ContrastiveStage(
        model=dataclasses.replace(C, logit_bias=-2.0),
        objective="sigmoid",
        image_size=24,
        keep=0.5,
        chunk=8,
        **SIZES,
    ),
    "pretrain": GenerativeStage(model=G, image_size=32, chunk=16, **SIZES),
    "retrieval": GenerativeStage(
        model=G,
        variant="retrieval",
        trainable_paths=("(?!qllama/lm_head)",),
        image_size=32,
        chunk=16,
        layer_decay=0.9,
        **SIZES,
    ),
    "finetune": FinetuneStage(
        model=ChatConfig(vision=VISION, llm=LLM, projector="mlp1"),
        compute=EXACT,
        image_size=32,
        image_slots=2,
        text_length=14,
        chunk=16,
    ),
    "language": LanguageStage(model=TEXT, chunk=16, **SIZES),
}
LORA = LoraConfig(rank=3, dropout=0.3)


def _adapted(config: Any) -> Any:
    """A model's config with adapters in every tower."""
    towers = [name for name in ("vision", "qllama", "llm") if getattr(config, name, None)]
    adapted = {n: dataclasses.replace(getattr(config, n), lora=LORA) for n in towers}
    return dataclasses.replace(config, **adapted)


for _name in ("pretrain", "finetune"):
    _stage: Any = STAGES[_name]
    STAGES[f"{_name} lora"] = dataclasses.replace(
        _stage,
        model=_adapted(_stage.model),
        trainable_paths=(".*_lora/", "projector/", "query_tokens"),
    )


def make_batch(stage: Stage, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random pictures, texts of every length, labels on some of the tokens."""
    rng = np.random.default_rng(seed)
    batch: dict[str, np.ndarray] = {}
    for name, spec in stage.batch_spec(size).items():
        if spec.dtype == np.uint8:
            batch[name] = rng.integers(0, 256, spec.shape).astype(np.uint8)
        elif name.endswith("mask"):
            lengths = rng.integers(3, spec.shape[1] + 1, (size, 1))
            batch[name] = np.arange(spec.shape[1]) < lengths
        else:
            batch[name] = rng.integers(1, 50, spec.shape).astype(np.int32)
    for name in list(batch):
        if f"{name}_mask" in batch:
            batch[name] = np.where(batch[f"{name}_mask"], batch[name], 0).astype(np.int32)
    if stage.name == "finetune":
        batch["text"][:, 1:9] = IMAGE_TOKEN  # two images of four tokens each
        used = np.arange(batch["text"].shape[1]) < rng.integers(11, batch["text"].shape[1] + 1)
        batch["segment"] = np.broadcast_to(used.astype(np.int32), batch["text"].shape).copy()
    if "labels" in batch:
        used = batch["segment"] > 0 if "segment" in batch else batch["text_mask"]
        learned = used & (batch["text"] > 0) & (rng.random(batch["text"].shape) < 0.7)
        learned[:, 2] &= rng.random(size) < 0.5
        batch["labels"] = np.where(learned, batch["text"], -100).astype(np.int32)
    if "image_id" in batch:
        batch["image_id"] = (np.arange(size) // 2).astype(np.int32)
    return {**batch, "example": np.arange(size, dtype=np.int32)}


def draw_parameters(definition: Definition, seed: int = 1) -> dict[str, np.ndarray]:
    """Pronounced weights for every path: no gradient is small because a weight is."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, variable in definition.variables.items():
        shape = variable.get_value().shape
        if path.startswith("logit_"):
            value = np.full(shape, 1.5 if path == "logit_scale" else -2.0)
        elif path == "itm_bias":
            # Undecided, its gradient would be the small difference of large sums.
            value = np.array([2.0, -2.0])
        elif path.endswith("_lora/a"):
            value = rng.normal(0, 0.1, shape)  # the rank is no number of inputs to go by
        elif len(definition.variables[path].get_metadata()["axes"]) == 1:
            value = rng.normal(0.5, 0.3, shape)
        else:
            value = rng.normal(0, 1.0 / np.sqrt(shape[-1]), shape)
        flat[path] = value.astype(np.float32)
    return flat


class Result(NamedTuple):
    loss: float
    metrics: dict[str, float]
    grads: dict[str, np.ndarray]


def on(stage: Stage, mesh: MeshConfig) -> Stage:
    """The stage as a run on the mesh would use it (vision heads padded)."""
    made = make_mesh(mesh, jax.devices()[: mesh.replica * mesh.fsdp * mesh.tensor])
    return Experiment(stage, TrainConfig(steps=1, global_batch=16), {}).on(made).stage


@functools.cache
def compute(
    name: str,
    sizes: tuple[int, int, int] = (1, 1, 1),
    accumulate: int = 1,
    cached: bool = False,
    size: int = 16,
) -> Result:
    """Loss, metrics and gradients of a stage's random batch on a mesh."""
    config = MeshConfig(*sizes)
    mesh = make_mesh(config, jax.devices()[: int(np.prod(sizes))])
    stage = on(STAGES[name], config)
    with jax.set_mesh(mesh):
        definition = Definition.of(stage.build, stage.trainable)
        values = draw_parameters(definition)
        trees = [
            unflatten({p: jax.device_put(values[p], x.sharding) for p, x in flatten(t).items()})
            for t in definition.abstract(mesh, "float32")
        ]
        batch = jax.tree.map(
            lambda x: jax.device_put(x, batch_sharding(mesh)), make_batch(stage, size)
        )
        step = jax.jit(value_and_grad(stage, definition, accumulate, cached))
        loss, metrics, grads = jax.device_get(step(*trees, batch, jax.random.key(7)))
    return Result(float(loss), {k: float(v) for k, v in metrics.items()}, flatten(grads))


# The softmax cancels what these add to all keys alike: their gradients are rounding noise.
NOISE = ("/k_bias", "/norm_k/bias")


def difference(result: Result, reference: Result) -> tuple[float, float, str]:
    """Relative difference of the loss, and the largest of the gradients with its path.

    Each gradient is measured against the largest magnitude of its tensor; those of `NOISE` against
    the largest of all tensors.
    """
    assert result.grads.keys() == reference.grads.keys()
    largest = max(np.abs(g).max() for g in reference.grads.values())
    worst = (0.0, "")
    for path, expected in reference.grads.items():
        scale = largest if path.endswith(NOISE) else np.abs(expected).max()
        assert scale > 0, f"{path} has no gradient at all"
        error = np.abs(result.grads[path] - expected).max() / scale
        worst = max(worst, (float(error), path))
    loss = abs(result.loss - reference.loss) / abs(reference.loss)
    return loss, *worst


@pytest.fixture(scope="session")
def stages() -> dict[str, Stage]:
    """The stages by name."""
    return STAGES


@pytest.fixture(scope="session")
def computed() -> Callable[..., Result]:
    """`compute`, remembered."""
    return compute


@pytest.fixture(scope="session")
def differ() -> Callable[[Result, Result], tuple[float, float, str]]:
    """`difference`."""
    return difference
