"""Three trainers of the demo's stage 1 behind one interface: ours, compact PyTorch, open_clip."""

from __future__ import annotations

import abc
import importlib.metadata
from typing import Any

import numpy as np

from internvl_jax.stages.contrastive import ContrastiveStage
from internvl_jax.stages.stage import Stage
from internvl_jax.train.experiment import Experiment

Batch = dict[str, np.ndarray]
EOS = 2
SIDES = ("ours", "torch", "torch_compiled", "open_clip")


def demo() -> Experiment:
    """The demo's stage 1."""
    from configs.demo import get_config
    from internvl_jax.train.experiment import resolve

    return resolve(get_config("contrastive"))


def demo_stage(keep: float) -> ContrastiveStage:
    """The stage of the demo's phase with that share of patches kept."""
    stages = [stage for _, stage in demo().schedule()]
    return next(s for s in stages if isinstance(s, ContrastiveStage) and s.keep == keep)


def random_batch(stage: ContrastiveStage, size: int) -> Batch:
    """Noise in the shape of the data pipeline's batches, captions of 4 tokens and more."""
    rng = np.random.default_rng(0)
    S, T = stage.image_size, stage.text_length
    length = rng.integers(4, T + 1, size)
    mask = np.arange(T) < length[:, None]
    ids = rng.integers(3, stage.vocab_size, (size, T))
    ids[np.arange(size), length - 1] = EOS
    return {
        "image": rng.integers(0, 256, (size, S, S, 3)).astype(np.uint8),
        "text": np.where(mask, ids, 0).astype(np.int32),
        "text_mask": mask,
    }


class Side(abc.ABC):
    """A trainer: `step` may return before its work is done, `wait` returns after it."""

    version: str

    @abc.abstractmethod
    def phase(self, keep: float) -> None:
        """From now on that share of the patches is kept."""

    @abc.abstractmethod
    def compile(self, batch: Batch) -> None:
        """Prepares `step` without taking one."""

    @abc.abstractmethod
    def step(self, batch: Batch) -> None:
        """One update."""

    @abc.abstractmethod
    def forward(self, batch: Batch) -> None:
        """The loss alone, without gradients."""

    @abc.abstractmethod
    def wait(self) -> float:
        """The last step's loss."""

    @abc.abstractmethod
    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] -> float32 [B, E], of any length."""

    @abc.abstractmethod
    def embed_texts(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """[B, T] each -> float32 [B, E], of any length."""


def make(side: str, steps: int, threads: int, seed: int = 0) -> Side:
    """A trainer with fresh parameters.

    Args:
        side: one of `SIDES`.
        steps: length of the run, for the schedule of the learning rate.
        threads: that it may compute with.
        seed: of its parameters and randomness.
    """
    if side == "ours":
        return Ours(steps, seed)
    return Torch(side, steps, threads, seed)


class Ours(Side):
    """`train.step`, compiled as `train.loop` does."""

    def __init__(self, steps: int, seed: int):
        import jax

        from internvl_jax.models.definition import Definition
        from internvl_jax.sharding.mesh import MeshConfig, make_mesh
        from internvl_jax.train.optimizer import learning_rate, make_optimizer
        from internvl_jax.train.step import initial_state

        experiment = demo()
        stage = experiment.stage
        self.version = f"jax {jax.__version__}"
        self.optim, self.mesh = experiment.optim, make_mesh(MeshConfig())
        self.key, self.updates, self.values = jax.random.key(seed), {}, {}
        with jax.set_mesh(self.mesh):
            definition = Definition.of(stage.build, stage.trainable)
            fresh = jax.jit(definition.fresh, static_argnums=0)(seed)
            params, self.frozen = split(fresh, stage)
            self.schedule = learning_rate(self.optim, steps)
            self.tx = make_optimizer(self.optim, steps, params, stage.lr_scale)
            start = lambda params: initial_state(params, self.tx, self.optim)
            self.state = jax.jit(start)(params)

    def phase(self, keep: float) -> None:
        import jax

        from internvl_jax.models.definition import Definition
        from internvl_jax.train.step import make_step

        self.keep = keep
        if keep in self.updates:
            return
        stage = demo_stage(keep)
        self.definition = definition = Definition.of(stage.build, stage.trainable)
        step = make_step(stage, definition, self.tx, self.optim, self.schedule)

        def loss(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
            rows = {**batch, "example": jax.numpy.arange(len(batch["text"]))}
            return stage.loss(definition.merge(params, frozen), rows, key)[0]

        self.updates[keep] = jax.jit(step, donate_argnums=0)
        self.values[keep] = jax.jit(loss)

    def _put(self, batch: Batch) -> dict[str, Any]:
        import jax

        from internvl_jax.sharding.rules import batch_sharding

        sharding = batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()
        }

    def compile(self, batch: Batch) -> None:
        import jax

        with jax.set_mesh(self.mesh):
            update = self.updates[self.keep]
            if not isinstance(update, jax.stages.Compiled):
                lowered = update.lower(self.state, self.frozen, self._put(batch), self.key)
                self.updates[self.keep] = lowered.compile()

    def step(self, batch: Batch) -> None:
        import jax

        with jax.set_mesh(self.mesh):
            self.state, metrics = self.updates[self.keep](
                self.state, self.frozen, self._put(batch), self.key
            )
        self.loss = metrics["loss"]

    def forward(self, batch: Batch) -> None:
        import jax

        with jax.set_mesh(self.mesh):
            self.loss = self.values[self.keep](
                self.state.params, self.frozen, self._put(batch), self.key
            )

    def wait(self) -> float:
        import jax

        jax.block_until_ready(self.state)
        return float(self.loss)

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        from internvl_jax.evaluate.embed import embed_images

        return embed_images(self.definition.merge(self.state.params, self.frozen), images, "C")

    def embed_texts(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        from internvl_jax.evaluate.embed import embed_texts

        return embed_texts(self.definition.merge(self.state.params, self.frozen), ids, mask)


def split(tree: Any, stage: Stage) -> tuple[Any, Any]:
    """Trained and frozen parameters."""
    from internvl_jax.tree import flatten, unflatten

    flat = flatten(tree)
    trained = {path: x for path, x in flat.items() if stage.trainable(path)}
    frozen = {path: x for path, x in flat.items() if not stage.trainable(path)}
    return unflatten(trained), unflatten(frozen)


class Torch(Side):
    """Compact PyTorch, eager or compiled, or open_clip's model, loss and update."""

    model: Any

    def __init__(self, side: str, steps: int, threads: int, seed: int):
        import torch

        from tests.benchmarks import torch_clip

        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        experiment = demo()
        self.optim, self.steps, self.done = experiment.optim, steps, 0
        self.version = f"torch {torch.__version__}"
        stage = demo_stage(1.0)
        if side == "open_clip":
            from tests.benchmarks import open_clip_model

            self.model = open_clip_model.build(stage.model, stage.text_length, EOS)
            self.optimizer = open_clip_model.adamw(self.model, self.optim)
            self.version += f", open_clip {importlib.metadata.version('open_clip_torch')}"
        else:
            from internvl_jax.models.definition import Definition
            from internvl_jax.tree import flatten

            self.model = torch_clip.TorchClip(stage.model, stage.text_length)
            fresh = Definition.of(stage.build, stage.trainable).fresh(seed)
            self.model.copy_from(flatten(fresh))
            self.optimizer = torch_clip.adamw(
                self.model, weight_decay=self.optim.weight_decay, b2=self.optim.b2
            )
        self.call = torch.compile(self.model) if side == "torch_compiled" else self.model
        self.open_clip = side == "open_clip"
        self.schedule = torch_clip.learning_rate

    def phase(self, keep: float) -> None:
        self.keep = keep
        if self.open_clip:
            from tests.benchmarks import open_clip_model

            open_clip_model.set_keep(self.model, keep)

    def compile(self, batch: Batch) -> None:
        # Forward and backward; the optimizer has nothing to compile.
        self._loss(batch).backward()

    def _loss(self, batch: Batch) -> Any:
        import torch

        from tests.benchmarks.torch_clip import random_patches

        images, ids, mask = (torch.from_numpy(batch[k]) for k in ("image", "text", "text_mask"))
        if self.open_clip:
            return self.call(images, ids)
        patches = len(self.model.pos) - 1
        return self.call(images, ids, mask, random_patches(len(images), patches, self.keep))

    def step(self, batch: Batch) -> None:
        import torch

        rate = self.schedule(self.done, self.steps, self.optim.peak_lr, self.optim.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self._loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip_norm)
        self.optimizer.step()
        if self.open_clip:
            self.model.clamp()
        self.done, self.loss = self.done + 1, loss

    def forward(self, batch: Batch) -> None:
        import torch

        with torch.no_grad():
            self.loss = self._loss(batch)

    def wait(self) -> float:
        return self.loss.item()

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        return self._embed(self.model.embed_images, images)

    def embed_texts(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self._embed(self.model.embed_texts, ids, mask)

    def _embed(self, function: Any, *arrays: np.ndarray) -> np.ndarray:
        import torch

        self.model.eval()
        with torch.no_grad():
            parts = [
                function(*(torch.from_numpy(a[i : i + 64]) for a in arrays))
                for i in range(0, len(arrays[0]), 64)
            ]
        self.model.train()
        return torch.cat(parts).numpy()
