"""Stage 3: supervised fine-tuning of a dialogue model (paper, section 3.3 and Table 23)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from internvl_jax.models.internvl_chat import ChatConfig, InternVLChat
from internvl_jax.stages.language import label_count, next_token_mean
from internvl_jax.stages.stage import Batch, Metrics, Stage, randomness

TRAIN_MLP = ("projector/", "query_projector/")
TRAIN_MLP_AND_LLM = (*TRAIN_MLP, "llm/")


@dataclasses.dataclass(frozen=True)
class FinetuneStage(Stage):
    """Next-token prediction on the answers of conversations about images.

    Attributes:
        model: the dialogue model.
        trainable_paths: `TRAIN_MLP` first, then `TRAIN_MLP_AND_LLM`; the towers stay frozen.
        chunk: tokens whose logits exist at a time on one device.
    """

    model: ChatConfig = ChatConfig()
    trainable_paths: tuple[str, ...] = TRAIN_MLP_AND_LLM
    chunk: int = 2048

    name: ClassVar[str] = "finetune"

    def __post_init__(self):
        visual = self.image_slots * self.model.visual_tokens(self.image_size)
        if visual >= self.text_length:
            raise ValueError(
                f"text_length={self.text_length} cannot hold the {visual} visual tokens of "
                f"{self.image_slots} image(s) at {self.image_size} px: make it longer."
            )

    @property
    def vocab_size(self) -> int:
        return self.model.llm.vocab_size

    def build(self, rngs: nnx.Rngs) -> InternVLChat:
        return InternVLChat(self.model, self.compute, rngs=rngs)

    def weight(self, batch: Batch) -> jax.Array:
        return label_count(batch["labels"])

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        images = self.images(batch)
        random = randomness(batch, key)
        hidden = model.hidden(images, batch["text"], batch["segment"], random)
        return next_token_mean(hidden, model.llm.head_kernel(), batch["labels"], self.chunk)

    def flops(self) -> int:
        cfg, M = self.model, self.image_slots
        patches = 1 + (self.image_size // cfg.vision.patch_size) ** 2
        # A frozen matrix under an adapter costs the product that carries the gradient on as well.
        # An adapter's own few FLOPs are left out.
        behind = bool(cfg.vision.lora)
        total = (1 + behind) * M * cfg.vision.flops(patches)
        if cfg.qllama is not None:
            behind = behind or bool(cfg.qllama.lora)
            once = M * cfg.qllama.flops(cfg.queries, queries=cfg.queries, vision_tokens=patches)
            total += (1 + behind) * once
        llm = cfg.llm.flops(self.text_length, logits=self.text_length)
        trained = any(p.startswith("llm") for p in self.trainable_paths)
        return total + (3 if trained else 2) * llm
