"""The protocol of a training stage."""

from __future__ import annotations

import abc
import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from internvl_jax import batch as batches
from internvl_jax.crop import crop_resize
from internvl_jax.models.compute import Compute
from internvl_jax.models.intern_vit import normalize_images
from internvl_jax.nn.regularize import Randomness

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Stage(abc.ABC):
    """What is learned: a model, which of its parameters, and the loss.

    A stage is a frozen dataclass that holds its settings; `train.step` turns any of them into one
    jitted, sharded update. Everything it needs at run time arrives as arguments.

    Attributes:
        compute: dtype, rematerialisation, padding.
        trainable_paths: regular expressions, matched at the start of a parameter's path.
        lr_scales: (regular expression, factor) pairs; the first that matches scales the learning
            rate, e.g. the text tower's 1e-4 beside the vision tower's 1e-3.
        text_length: T, length of the token rows.
        image_size: S in pixels.
        image_slots: M, images per conversation.
        canvas: C, side of the canvases that the device crops images from; 0 crops on the host.
    """

    compute: Compute = Compute()
    trainable_paths: tuple[str, ...] = ("",)
    lr_scales: tuple[tuple[str, float], ...] = ()
    text_length: int = 80
    image_size: int = 224
    image_slots: int = 1
    canvas: int = 0

    name: ClassVar[str]
    """Which batches the data pipeline builds for it."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Rows of the embedding that reads ``text``; the tokenizer must have as many ids."""

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """A fresh model."""

    def trainable(self, path: str) -> bool:
        """Whether the parameter of that path is trained; all others rest frozen."""
        return any(re.match(r, path) for r in self.trainable_paths)

    def lr_scale(self, path: str, shape: tuple[int, ...]) -> float | np.ndarray:
        """Factor on the learning rate of a parameter; an array is one factor per stacked layer."""
        return next((f for r, f in self.lr_scales if re.match(r, path)), 1.0)

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a global batch (see `internvl_jax.batch`)."""
        spec = batches.spec(
            self.name,
            batch=batch,
            text_length=self.text_length,
            image_size=self.image_size,
            image_slots=self.image_slots,
            canvas=self.canvas,
        )
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in spec.items()}

    def images(self, batch: Batch) -> jax.Array:
        """A batch's images [..., S, S, 3] float32, cropped where that is left to us, normalised."""
        image = batch["image"]
        if self.canvas:
            canvases, S = image.reshape(-1, *image.shape[-3:]), self.image_size
            cropped = crop_resize(canvases, batch["crop"].reshape(-1, 5), S)
            image = cropped.reshape(*image.shape[:-3], S, S, 3)
        return normalize_images(image)

    def weight(self, batch: Batch) -> jax.Array:
        """How much a microbatch counts in an accumulated mean; the examples by default."""
        return jnp.float32(next(iter(batch.values())).shape[0])

    @abc.abstractmethod
    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        """The loss of a batch and what to log beside it.

        Args:
            model: what `build` made, with the current parameters.
            batch: arrays of `batch_spec` plus ``example`` [B], the index in the global batch.
            key: PRNG key of this step; None evaluates without any randomness.
        """

    @abc.abstractmethod
    def flops(self) -> int:
        """Model FLOPs of one training sample: forward, and backward for what it needs."""


class EmbeddingStage(Stage):
    """A stage whose loss is a function of per-example embeddings, so gradients can be cached."""

    @abc.abstractmethod
    def embed(self, model: Any, batch: Batch, key: jax.Array | None) -> Any:
        """Per-example embeddings, a pytree of [B, E] arrays."""

    @abc.abstractmethod
    def loss_from_embeddings(
        self, model: Any, embeddings: Any, batch: Batch
    ) -> tuple[jax.Array, Metrics]:
        """The loss over all embeddings of the global batch."""

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        return self.loss_from_embeddings(model, self.embed(model, batch, key), batch)


def randomness(batch: Batch, key: jax.Array | None) -> Randomness | None:
    """What the model draws from in this step; None without a key."""
    return None if key is None else Randomness(key, batch["example"])
