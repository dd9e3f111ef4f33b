"""What the stored case of the dialogue model's vision side holds, computed by our model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.convert.architectures import model_config
from internvl_jax.convert.case import EXACT, Arrays, Case, CaseError, jit, parameters
from internvl_jax.convert.from_torch import Tensors, check, load
from internvl_jax.convert.key_maps import Component, KeyMap, definition, key_map, mlp, tower
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig, InternVLChat
from internvl_jax.models.llama import LlamaConfig


def chat(case: Case) -> Arrays:
    """Features of both kinds and the three projectors, each through a dialogue model with it."""
    base = _config(case)
    images = case.images()
    heads = {
        # output -> (projector, with QLLaMA, names of the projectors' weights)
        "two_mlp_out": ("mlp2x_gelu", True, ("two_mlp.mlp1.", "two_mlp.mlp2.")),
        "mlp_vit_out": ("mlp2x_gelu", False, ("mlp_vit.",)),
        "mlp_query_out": ("none", True, ("mlp_query.",)),
    }
    weights = Tensors(case.folder / "weights.safetensors")
    maps = {}
    for output, (projector, queries, names) in heads.items():
        cfg = dataclasses.replace(base, projector=projector)
        if not queries:
            cfg = dataclasses.replace(cfg, qllama=None, queries=0)
        maps[output] = cfg, _keys(cfg, names)
    expected = {n: s for _, keys in maps.values() for n, s in keys.shapes.items()}
    check(weights.shapes, expected, weights.source)

    result: Arrays = {}
    for output, (cfg, keys) in maps.items():
        part = {name: weights[name] for name in keys.entries}
        model = definition(cfg, EXACT)
        given = parameters(load(part, cfg, keys=keys))
        blank = {p: jnp.zeros(v.shape) for p, v in keys.ours.items() if p not in given}

        def forward(params: Any) -> dict[str, jax.Array]:
            chat: InternVLChat = model.merge(params)  # noqa: B023
            queries, patches = chat.features(images)
            found = {output: chat.visual_embeddings(images)}  # noqa: B023
            if queries is not None:
                found |= {"query_features": queries, "vit_features": patches}
            return found | {"embeddings": chat.vision.embed(images)}

        result |= jax.tree.map(np.asarray, jit(forward)(given | blank))
    return result


def _config(case: Case) -> ChatConfig:
    """The tower's config and a language model that is never called."""
    tower_config, _ = model_config(case.config)
    settings = case.config.get("chat", {})
    if not isinstance(tower_config, InternVLConfig) or "llm_hidden" not in settings:
        raise CaseError(f"{case.folder}/config.json lacks qllama_config or chat.llm_hidden.")
    depth = tower_config.vision.depth
    layer = settings.get("mm_vision_select_layer", -1)
    return ChatConfig(
        vision=tower_config.vision,
        qllama=tower_config.qllama,
        queries=tower_config.queries,
        llm=LlamaConfig(vocab_size=1, width=settings["llm_hidden"], depth=1, heads=1, mlp_dim=1),
        # hidden_states holds the embeddings first: index 0..depth counts from them.
        select_layer=layer if layer < 0 else layer - depth - 1,
    )


def _keys(cfg: ChatConfig, names: tuple[str, ...]) -> KeyMap:
    # Without QLLaMA our model holds the ViT alone, but here it is a part of the whole tower.
    official = "tower." if cfg.qllama is not None else "tower.vision_model."
    parts: list[Component] = tower(cfg, official)
    ours = ("projector/", "query_projector/") if cfg.projector != "none" else ("query_projector/",)
    parts += [mlp(path, name) for path, name in zip(ours, names, strict=False)]
    return key_map(cfg, "hf", parts)
