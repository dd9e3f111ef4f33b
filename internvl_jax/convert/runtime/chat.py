"""InternVL-Chat: a vision tower and/or QLLaMA glued into a language model (paper, Fig. 4d)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import ChatConfig
from .decoder import Decoder
from .generate import Start, start
from .vit import InternViT

IMAGE_TOKEN = -200
"""Token id at which one visual token is spliced in."""


def pixel_unshuffle(tokens: Tensor, version: str) -> Tensor:
    """Folds each 2 x 2 square of patches into one token, [B, P, D] -> [B, P / 4, 4 D].

    ``v2`` emits the new tokens row-major; ``v1`` is the same array transposed, as models before
    InternVL 1.5 were trained.
    """
    B, P, D = tokens.shape
    n = round(P**0.5) // 2
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return tokens.reshape(B, n, 2, n, 2, D).permute(order).reshape(B, n * n, 4 * D)


def mlp2x_gelu(width: int, out: int) -> nn.Sequential:
    """Linear, GELU, linear, with biases."""
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


class InternVLChat(nn.Module):
    """ViT (and QLLaMA) -> projectors -> language model."""

    def __init__(self, cfg: ChatConfig):
        super().__init__()
        self.cfg = cfg
        width, out = cfg.vision.width, cfg.llm.width
        self.vision_model = InternViT(cfg.vision)
        if cfg.qllama is not None:
            self.qllama = Decoder(cfg.qllama)
            self.query_tokens = nn.Parameter(torch.empty(1, cfg.queries, cfg.qllama.width))
            self.query_projector = mlp2x_gelu(cfg.qllama.width, out)
        if cfg.projector == "mlp2x_gelu":
            self.projector = mlp2x_gelu(width, out)
        elif cfg.projector == "mlp1":
            self.projector = nn.Sequential(nn.LayerNorm(4 * width), *mlp2x_gelu(4 * width, out))
        self.language_model = Decoder(cfg.llm)

    def visual_embeddings(self, images: Tensor) -> Tensor:
        """Normalised pictures [B, S, S, 3] -> [B, V, D]: the queries first, then the patches."""
        cfg = self.cfg
        tokens, patches = self.vision_model(images, cfg.select_layer, last=cfg.qllama is not None)
        parts = []
        if cfg.qllama is not None:
            x = self.query_tokens.expand(len(images), -1, -1)
            queries = self.qllama(x, vision=tokens, queries=cfg.queries)
            parts.append(self.query_projector(queries))
        if cfg.projector != "none":
            patches = patches[:, 1:]
            if cfg.projector == "mlp1":
                patches = pixel_unshuffle(patches, cfg.unshuffle)
            parts.append(self.projector(patches))
        return torch.cat(parts, dim=1)

    def splice(self, ids: Tensor, visual: Tensor) -> Tensor:
        """Puts visual tokens at the `IMAGE_TOKEN` positions, in reading order of all rows.

        Args:
            ids: [B, T].
            visual: [M, V, D], the M pictures of all rows, M * V as many as positions ask for.

        Returns:
            [B, T, D] embeddings.
        """
        here = (ids == IMAGE_TOKEN)[..., None]
        words = self.language_model.embed(ids.clamp(min=0))
        return words.masked_scatter(here, visual.to(words.dtype))

    def read(self, images: Tensor | None, ids: Tensor, mask: Tensor) -> Start:
        """Reads conversations with pictures spliced in: where an answer starts.

        Args:
            images: [M, S, S, 3] normalised, of all rows in reading order; None for no picture.
            ids: [B, T], V `IMAGE_TOKEN`s per picture, left-padded.
            mask: bool [B, T].
        """
        llm = self.language_model
        x = llm.embed(ids) if images is None else self.splice(ids, self.visual_embeddings(images))
        return start(llm, x, mask)
