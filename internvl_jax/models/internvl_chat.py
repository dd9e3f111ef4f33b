"""InternVL-Chat: a vision tower and/or QLLaMA glued into a language model (paper, Fig. 4d)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.batch import IMAGE_TOKEN
from internvl_jax.models.compute import Compute
from internvl_jax.models.intern_vit import InternViT, VitConfig
from internvl_jax.models.llama import Llama, LlamaConfig
from internvl_jax.models.projector import Mlp1, Mlp2xGelu, projector_param_count
from internvl_jax.models.qllama import packed_positions
from internvl_jax.nn.attend import Mask
from internvl_jax.nn.param import normal, param
from internvl_jax.nn.regularize import Randomness

QLLAMA, LLM = 1 << 20, 1 << 21
"""Parts of the step's randomness; the vision tower has those below."""


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Architecture of a dialogue model.

    Attributes:
        qllama: QLLaMA between the tower and the LLM; None glues the tower in directly.
        queries: number of query tokens, 0 without QLLaMA.
        projector: ``mlp2x_gelu`` or ``mlp1`` for the patch tokens, ``none`` to leave them out
            (needs QLLaMA). With QLLaMA the queries always have their own ``mlp2x_gelu``, so
            ``mlp2x_gelu`` plus QLLaMA is the original's ``two_mlp``.
        unshuffle: version of ``mlp1``'s pixel unshuffle, ``v1`` or ``v2``.
        select_layer: which hidden state the patch tokens are read from, counted from the end as the
            original counts: -1 is the last block's output, -4 the output of block L - 4. QLLaMA
            always reads the last one.
    """

    vision: VitConfig = VitConfig()
    llm: LlamaConfig = LlamaConfig(vocab_size=32000, eps=1e-5)
    qllama: LlamaConfig | None = None
    queries: int = 0
    projector: str = "mlp2x_gelu"
    unshuffle: str = "v2"
    select_layer: int = -1

    def __post_init__(self):
        if self.projector not in ("mlp2x_gelu", "mlp1", "none"):
            raise ValueError(f"Unknown projector {self.projector!r}: use mlp2x_gelu, mlp1 or none.")
        if (self.qllama is None) != (self.queries == 0):
            raise ValueError("qllama and queries go together: give both or neither.")
        if self.projector == "none" and self.qllama is None:
            raise ValueError(
                "projector='none' without QLLaMA would leave the language model blind."
            )
        if not -self.vision.depth <= self.select_layer <= -1:
            raise ValueError(
                f"select_layer={self.select_layer} lies outside -{self.vision.depth}..-1."
            )

    def visual_tokens(self, image_size: int) -> int:
        """How many language-model positions one image takes."""
        patches = (image_size // self.vision.patch_size) ** 2
        patches = {"mlp2x_gelu": patches, "mlp1": patches // 4, "none": 0}[self.projector]
        return self.queries + patches

    def param_count(self) -> int:
        """Number of parameters."""
        count = self.vision.param_count() + self.llm.param_count()
        if self.projector != "none":
            count += projector_param_count(self.projector, self.vision.width, self.llm.width)
        if self.qllama is not None:
            count += self.qllama.param_count() + self.queries * self.qllama.width
            count += projector_param_count("mlp2x_gelu", self.qllama.width, self.llm.width)
        return count


class InternVLChat(nnx.Module):
    """ViT (and QLLaMA) -> projectors -> LLM."""

    def __init__(self, cfg: ChatConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.cfg, self.compute = cfg, compute
        self.vision = InternViT(cfg.vision, compute.of("vision"), rngs=rngs)
        if cfg.qllama is None:
            self.qllama = None
        else:
            self.qllama = Llama(cfg.qllama, compute.of("qllama"), rngs=rngs)
            width = cfg.qllama.width
            self.query_tokens = param(rngs, (cfg.queries, width), (None, "embed"), normal(0.02))
            self.query_projector = Mlp2xGelu(width, cfg.llm.width, rngs=rngs)
        if cfg.projector == "mlp2x_gelu":
            self.projector = Mlp2xGelu(cfg.vision.width, cfg.llm.width, rngs=rngs)
        elif cfg.projector == "mlp1":
            self.projector = Mlp1(cfg.vision.width, cfg.llm.width, version=cfg.unshuffle, rngs=rngs)
        else:
            self.projector = None
        self.llm = Llama(cfg.llm, compute.of("llm"), rngs=rngs)

    def features(
        self, images: jax.Array, random: Randomness | None = None
    ) -> tuple[jax.Array | None, jax.Array]:
        """Query outputs [B, Q, Dq] (None without QLLaMA) and patch features [B, P, Dv], no CLS."""
        layer = self.cfg.select_layer
        # Without adapters the tower stands still, and drops no paths either.
        own = random if self.cfg.vision.lora else None
        out = self.vision(images, taps=() if layer == -1 else (layer,), random=own)
        patches = (out.tokens if layer == -1 else out.taps[0])[:, 1:]
        if self.qllama is None:
            return None, patches
        tokens = self.query_tokens[...].astype(self.compute.jnp_dtype)
        x = jnp.broadcast_to(tokens, (images.shape[0], *tokens.shape))
        Q = tokens.shape[0]
        positions = jnp.broadcast_to(jnp.arange(Q), x.shape[:2])
        random = None if random is None else random.fold(QLLAMA)
        queries = self.qllama(
            x, positions, Mask(), vision=out.tokens, queries=Q, random=random
        ).hidden
        return queries, patches

    def visual_embeddings(self, images: jax.Array, random: Randomness | None = None) -> jax.Array:
        """Normalised images [B, S, S, 3] -> [B, V, D]: the queries first, then the patches.

        Paper Fig. 4d labels the input ``<image><query>``; the released code, followed here, puts
        the queries first.
        """
        queries, patches = self.features(images, random)
        parts = []
        if queries is not None:
            parts.append(self.query_projector(queries))
        if self.projector is not None:
            parts.append(self.projector(patches))
        return jnp.concatenate(parts, axis=1)

    def splice(self, text: jax.Array, visual: jax.Array) -> jax.Array:
        """Puts visual tokens at the `IMAGE_TOKEN` positions, in reading order.

        Args:
            text: ids [B, T].
            visual: [B, M*V, D], the image slots' tokens one after another; what no position asks
                for (an empty slot) is left out.

        Returns:
            [B, T, D] embeddings.
        """
        here = text == IMAGE_TOKEN
        words = self.llm.embed(jnp.where(here, 0, text))
        index = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, visual.shape[1] - 1)
        spliced = jnp.take_along_axis(visual.astype(words.dtype), index[..., None], axis=1)
        return jnp.where(here[..., None], spliced, words)

    def hidden(
        self,
        images: jax.Array,
        text: jax.Array,
        segment: jax.Array,
        random: Randomness | None = None,
    ) -> jax.Array:
        """Final hidden states of the language model.

        Args:
            images: [B, M, S, S, 3] normalised, M image slots.
            text: ids [B, T] with V `IMAGE_TOKEN`s per image, right-padded.
            segment: int32 [B, T], the conversation of the row that a token belongs to, from 1 on;
                0 on padding.
            random: of the B rows, turns the adapters' dropout on.
        """
        B, M = images.shape[:2]
        slots = None if random is None else random.rows(M)
        visual = self.visual_embeddings(images.reshape(B * M, *images.shape[2:]), slots)
        x = self.splice(text, visual.reshape(B, M * visual.shape[1], visual.shape[2]))
        own = None if random is None else random.fold(LLM)
        mask = Mask(segment, causal=True)
        return self.llm(x, packed_positions(segment), mask, random=own).hidden
