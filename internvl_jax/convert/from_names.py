"""An architecture read off the names and shapes of its tensors, where there is no config.json.

What shapes do not show is taken from the published models: heads of 128 (LLaMA, InternViT-6B) or
64 (InternViT-300M), 16 heads in the attention pools, the official epsilons.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from internvl_jax.config import ConfigError
from internvl_jax.convert.key_maps import VIT_STYLES
from internvl_jax.convert.names import Part, Shape
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.llama import LlamaConfig

Shapes = Mapping[str, Shape]
# Width of a published tower -> its heads.
VIT_HEADS = {3200: 25, 1024: 16}
HEAD_DIM = 128
CROSS_FREQUENCY = 2
POOL_HEADS = 16


def model_config(names: Shapes) -> tuple[InternVLConfig | VitConfig, str]:
    """The architecture of a file that has no config.json.

    Args:
        names: official name -> shape of every tensor.

    Returns:
        Our config, and the naming.

    Raises:
        ConfigError: for files of which shapes do not tell enough.
    """
    if "transformer.embed_tokens.weight" in names and "patch_embed.proj.weight" in names:
        return internvl(names, "plain"), "plain"
    if "qllama.model.embed_tokens.weight" in names and "text_projection" in names:
        return internvl(names, "hf"), "hf"
    for style, (own, _, _) in VIT_STYLES.items():
        if _name(own["pos"]) in names:
            return vit(names, style=style), style
    raise ConfigError(
        "There is no config.json, and the names of the tensors are neither a stage-1 file's nor "
        "those of InternVL-14B or InternViT: put the model's config.json beside the weights."
    )


def internvl(names: Shapes, naming: str) -> InternVLConfig:
    """A model of the two towers.

    Args:
        names: official name -> shape.
        naming: ``plain`` or ``hf``.

    Raises:
        ConfigError: if something is missing or has sizes no model has.
    """
    plain = naming == "plain"
    queries = 0 if plain else _shape(names, "query_tokens")[1] if "query_tokens" in names else 0
    text = decoder(names, "transformer." if plain else "qllama.model.", head=not plain)
    return InternVLConfig(
        vision=vit(names, "" if plain else "vision_model.", naming),
        qllama=text,
        queries=queries,
        embed_dim=_shape(names, "text_projection")[1],
        pool_heads=POOL_HEADS,
    )


def vit(names: Shapes, prefix: str = "", style: str = "hf") -> VitConfig:
    """A vision tower.

    Args:
        names: official name -> shape.
        prefix: of the tower's names.
        style: one of `key_maps.VIT_STYLES`.

    Raises:
        ConfigError: as `internvl`.
    """
    own, layer, layers = VIT_STYLES[style]
    first = prefix + layers.format(0)
    width, _, patch, _ = _shape(names, prefix + _name(own["patch/kernel"]))
    if width not in VIT_HEADS:
        raise ConfigError(
            f"A vision tower of width {width} is none of the published ones, and the shapes do not "
            "tell its number of heads: put the model's config.json beside the weights."
        )
    return VitConfig(
        image_size=table_side(names, prefix + _name(own["pos"])) * patch,
        patch_size=patch,
        width=width,
        depth=_count(names, prefix + layers),
        heads=VIT_HEADS[width],
        mlp_dim=_shape(names, first + _name(layer["mlp/fc1"]))[0],
        norm="layer" if first + _name(layer["norm1/bias"]) in names else "rms",
        qk_norm=first + _name(layer["attn/q_norm/scale"]) in names,
        qkv_bias=first + _name(layer["attn/qkv_bias"]) in names,
    )


def table_side(names: Shapes, name: str) -> int:
    """Patches along one side of the picture that a position table [1, 1 + side^2, D] is for.

    Raises:
        ConfigError: if it is no square.
    """
    rows = _shape(names, name)[-2]
    side = math.isqrt(rows - 1)
    if side * side != rows - 1:
        raise ConfigError(
            f"The position table {name} has {rows} rows, which is no square of patches and one "
            "class token: only square tables are known."
        )
    return side


def decoder(names: Shapes, prefix: str, *, head: bool) -> LlamaConfig:
    """QLLaMA, or the text tower that it begins as.

    Args:
        names: official name -> shape.
        prefix: of the decoder's names.
        head: whether the model has an output head.

    Raises:
        ConfigError: as `internvl`.
    """
    vocabulary, width = _shape(names, f"{prefix}embed_tokens.weight")
    first = f"{prefix}layers.0."
    rows = _shape(names, f"{first}self_attn.q_proj.weight")[0]
    if rows % HEAD_DIM:
        raise ConfigError(
            f"{first}self_attn.q_proj.weight has {rows} rows, which are no heads of {HEAD_DIM}: "
            "put the model's config.json beside the weights."
        )
    heads = rows // HEAD_DIM
    keys = _shape(names, f"{first}self_attn.k_proj.weight")[0] // HEAD_DIM
    cross = re.compile(re.escape(f"{prefix}layers.") + r"(\d+)\.cross_attn\.k_proj\.weight")
    crossing = sorted(int(m[1]) for m in map(cross.fullmatch, names) if m)
    return LlamaConfig(
        vocab_size=vocabulary,
        width=width,
        depth=_count(names, f"{prefix}layers.{{}}."),
        heads=heads,
        kv_heads=None if keys == heads else keys,
        head_dim=None if rows == width else HEAD_DIM,
        mlp_dim=_shape(names, f"{first}mlp.gate_proj.weight")[0],
        head=head,
        cross_frequency=crossing[1] if len(crossing) > 1 else CROSS_FREQUENCY,
        vision_width=_shape(names, f"{first}cross_attn.k_proj.weight")[1] if crossing else 0,
        pad_id=0,
    )


def _shape(names: Shapes, name: str) -> Shape:
    if name not in names:
        raise ConfigError(f"The weights lack {name}, without which their sizes are not known.")
    return names[name]


def _count(names: Shapes, layers: str) -> int:
    """How many layers: one more than the highest number."""
    pattern = re.compile(re.escape(layers).replace(r"\{\}", r"(\d+)"))
    return 1 + max((int(m[1]) for m in map(pattern.match, names) if m), default=-1)


def _name(part: Part | tuple[Part, ...]) -> str:
    return part.name if isinstance(part, Part) else part[0].name
