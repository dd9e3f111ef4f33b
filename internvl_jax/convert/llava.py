"""LLaVA-style InternVL-Chat: a LLaMA config with ``mm_*`` keys, and a tower it only names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from internvl_jax.config import ConfigError
from internvl_jax.convert import from_names
from internvl_jax.convert.key_maps import LLAVA_TOWER
from internvl_jax.convert.names import Shape
from internvl_jax.models import presets
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig

PROJECTOR = "model.mm_projector."
# How the released code tells its towers apart: by the name of the folder they are in.
INTERNVIT = re.compile(r"intern_?vit[_-]?6b", re.IGNORECASE)
INTERNVL_14B = re.compile(r"intern_?vl[_-]?14b", re.IGNORECASE)
SHORTENED = re.compile(r"v(1[-_.][25]|2[-_.]5)", re.IGNORECASE)


def chat(
    config: Mapping[str, Any], llm: LlamaConfig, names: Mapping[str, Shape]
) -> tuple[ChatConfig, str]:
    """The dialogue model of such a folder, with its tower inside or named.

    Args:
        config: parsed ``config.json``.
        llm: the language model it describes.
        names: official name -> shape of every tensor; empty if only the config is there.

    Returns:
        Our config, and the naming: ``llava`` or ``llava-without-tower``.

    Raises:
        ConfigError: for a tower or a projector that we don't have.
    """
    inside = any(name.startswith(LLAVA_TOWER) for name in names)
    vision, qllama, queries = _inside(names) if inside else _named(config)
    feature = config.get("mm_vision_select_feature", "patch")
    if feature != "patch":
        raise ConfigError(
            f"mm_vision_select_feature={feature!r} is not supported: only 'patch' is."
        )
    layer = config.get("mm_vision_select_layer", -1)
    cfg = ChatConfig(
        vision=vision,
        llm=llm,
        qllama=qllama,
        queries=queries,
        projector=_projector(config, names, vision, qllama),
        # hidden_states holds the embeddings first: index 0..depth counts from them.
        select_layer=layer if layer < 0 else layer - vision.depth - 1,
    )
    return cfg, "llava" if inside or not names else "llava-without-tower"


def _inside(names: Mapping[str, Shape]) -> tuple[VitConfig, LlamaConfig | None, int]:
    if f"{LLAVA_TOWER}query_tokens" not in names:
        return from_names.vit(names, LLAVA_TOWER), None, 0
    return (
        from_names.vit(names, f"{LLAVA_TOWER}vision_model."),
        from_names.decoder(names, f"{LLAVA_TOWER}qllama.model.", head=True),
        names[f"{LLAVA_TOWER}query_tokens"][1],
    )


def _named(config: Mapping[str, Any]) -> tuple[VitConfig, LlamaConfig | None, int]:
    tower = str(config.get("mm_vision_tower"))
    size = 448 if "448" in tower else 224
    if INTERNVIT.search(tower):
        depth = 45 if SHORTENED.search(tower) else 48
        return VitConfig(image_size=size, depth=depth), None, 0
    if INTERNVL_14B.search(tower):
        whole = presets.internvl_14b_224()
        return VitConfig(image_size=size), whole.qllama, whole.queries
    raise ConfigError(
        f"The vision tower mm_vision_tower={tower!r} is neither an InternViT-6B nor InternVL-14B, "
        "and the weights do not hold it."
    )


def _projector(
    config: Mapping[str, Any],
    names: Mapping[str, Shape],
    vision: VitConfig,
    qllama: LlamaConfig | None,
) -> str:
    # The released code's default is one linear layer, whose tensors are called otherwise.
    default = "mlp2x_gelu" if f"{PROJECTOR}2.weight" in names else "linear"
    kind = config.get("mm_projector_type", default)
    if kind not in ("mlp2x_gelu", "two_mlp"):
        raise ConfigError(
            f"mm_projector_type={kind!r} is not supported: only mlp2x_gelu and two_mlp are."
        )
    single = names.get(f"{PROJECTOR}0.weight")
    if qllama is None or single is None:
        return "mlp2x_gelu"
    if single[1] == qllama.width != vision.width:
        return "none"
    raise ConfigError(
        f"{PROJECTOR}0.weight reads rows of {single[1]}: beside QLLaMA one projector alone must "
        f"read its query outputs, rows of {qllama.width}."
    )
