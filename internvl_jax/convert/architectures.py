"""An official ``config.json`` <-> our model config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from internvl_jax.config import ConfigError
from internvl_jax.convert.key_maps import ModelConfig
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig

NORMS = {"rms_norm": "rms", "layer_norm": "layer"}
# Which decoders have biases or norms that their config.json does not mention.
DECODERS = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}


def model_config(config: Mapping[str, Any]) -> tuple[ModelConfig, str]:
    """The architecture an official ``config.json`` describes, recognised by its keys.

    What a file leaves out has the value the official class gives it.

    Args:
        config: parsed JSON of an InternVL-14B, InternViT, plain stage-1, InternVLChatModel or
            LLaMA-family folder.

    Returns:
        Our config, and the naming its weights have (see `key_maps.components`).

    Raises:
        ConfigError: one sentence, if it is none of these or asks for what we don't have.
    """
    try:
        if "qllama_config" in config:
            return _internvl(config), "hf"
        if "llama_config" in config:
            return _plain(config), "plain"
        if "llm_config" in config:
            return _chat(config), "remote"
        if "qk_normalization" in config or config.get("model_type") == "intern_vit_6b":
            return vit(config), "hf"
        if "num_attention_heads" in config and "vocab_size" in config:
            return llama(config), "hf"
        # Reference folders hold a bare tower's config one level down.
        if "vision_config" in config and not {"text_config", "llm_config"} & set(config):
            return vit(config["vision_config"]), "hf"
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"config.json describes no model that can be built: {error}") from None
    raise ConfigError(
        "config.json has none of qllama_config, llama_config, llm_config, vision_config: "
        "it belongs to no model of the family that is known here."
    )


def vit(config: Mapping[str, Any]) -> VitConfig:
    """InternVisionConfig -> `VitConfig`."""
    _only(config, "hidden_act", "gelu")
    norm = config.get("norm_type", "rms_norm")
    if norm not in NORMS:
        raise ConfigError(
            f"norm_type={norm!r} of the vision tower is unknown: use {sorted(NORMS)}."
        )
    return VitConfig(
        image_size=_side(config.get("image_size", 224)),
        patch_size=_side(config.get("patch_size", 14)),
        width=config.get("hidden_size", 3200),
        depth=config.get("num_hidden_layers", 48),
        heads=config.get("num_attention_heads", 25),
        mlp_dim=config.get("intermediate_size", 12800),
        norm=NORMS[norm],
        qk_norm=config.get("qk_normalization", True),
        qkv_bias=config.get("qkv_bias", False),
        eps=config.get("layer_norm_eps", 1e-6),
        layer_scale=config.get("initializer_factor", 0.1),
        drop_path=config.get("drop_path_rate", 0.0),
        drop_path_mode="linear",
    )


def llama(config: Mapping[str, Any]) -> LlamaConfig:
    """A decoder's config of the LLaMA family -> `LlamaConfig`."""
    _only(config, "hidden_act", "silu")
    if config.get("rope_scaling"):
        raise ConfigError("rope_scaling is set: scaled rotary embeddings are not supported.")
    name = (config.get("architectures") or [config.get("model_type", "llama")])[0]
    kind = name.lower().removesuffix("forcausallm")
    if kind not in DECODERS:
        raise ConfigError(f"The decoder {name!r} is unknown: use one of {sorted(DECODERS)}.")
    bias = config.get("attention_bias", False)
    pad = config.get("pad_token_id")
    theta = config.get("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta", 1e4))
    options = {"qkv_bias": bias, "out_bias": bias, **DECODERS[kind]}
    return LlamaConfig(
        vocab_size=config.get("vocab_size", 32000),
        width=config.get("hidden_size", 4096),
        depth=config.get("num_hidden_layers", 32),
        heads=config.get("num_attention_heads", 32),
        kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        mlp_dim=config.get("intermediate_size", 11008),
        eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(theta),
        tied_head=config.get("tie_word_embeddings", False),
        pad_id=pad if pad is not None and pad >= 0 else None,
        **options,
    )


def _qllama(config: Mapping[str, Any], **options: Any) -> LlamaConfig:
    # The official class hard-codes the base of its rotary embedding and pads with id 0.
    config = {"pad_token_id": 0, **config, "rope_theta": 1e4, "architectures": ["llama"]}
    return dataclasses.replace(llama(config), **options)


def _internvl(config: Mapping[str, Any]) -> InternVLConfig:
    vision = vit(config.get("vision_config", {}))
    queries = config.get("num_query_token", 96)
    frequency = config.get("cross_attention_frequency", 2)
    return InternVLConfig(
        vision=vision,
        qllama=_qllama(
            config["qllama_config"],
            cross_frequency=frequency,
            vision_width=vision.width if queries else 0,
        ),
        queries=queries,
        embed_dim=config.get("clip_embed_dim", 768),
        pool_heads=config.get("attn_pool_num_heads", 16),
    )


def _plain(config: Mapping[str, Any]) -> InternVLConfig:
    width = config.get("embed_dim", 3200)
    return InternVLConfig(
        vision=VitConfig(
            image_size=_side(config.get("img_size", 224)),
            patch_size=_side(config.get("patch_size", 14)),
            width=width,
            depth=config.get("depth", 48),
            heads=config.get("num_heads", 25),
            mlp_dim=int(width * config.get("mlp_ratio", 4)),
            qk_norm=config.get("qk_normalization", True),
            qkv_bias=config.get("qkv_bias", False),
            layer_scale=config.get("init_values", 0.1),
        ),
        qllama=_qllama(config["llama_config"], head=False),
        queries=0,
        embed_dim=config.get("clip_embed_dim", 768),
        pool_heads=config.get("attn_pool_num_heads", 16),
    )


def _chat(config: Mapping[str, Any]) -> ChatConfig:
    if config.get("downsample_ratio", 0.5) != 0.5:
        raise ConfigError(
            f"downsample_ratio={config['downsample_ratio']} is not 0.5, the only one known."
        )
    if config.get("use_backbone_lora") or config.get("use_llm_lora"):
        raise ConfigError("config.json asks for LoRA adapters: merge them before converting.")
    return ChatConfig(
        vision=vit(config["vision_config"]),
        llm=llama(config["llm_config"]),
        projector="mlp1",
        unshuffle=config.get("ps_version", "v1"),
        select_layer=config.get("select_layer", -1),
    )


def official_config(cfg: InternVLConfig | VitConfig, naming: str) -> dict[str, Any]:
    """The ``config.json`` of an exported model, as `model_config` and the official classes read it.

    Args:
        cfg: architecture.
        naming: ``hf`` or ``plain``.
    """
    if isinstance(cfg, VitConfig):
        return _vision_config(cfg)
    if naming == "plain":
        vision = cfg.vision
        return {
            "img_size": vision.image_size,
            "patch_size": vision.patch_size,
            "embed_dim": vision.width,
            "depth": vision.depth,
            "num_heads": vision.heads,
            "mlp_ratio": _ratio(vision.mlp_dim, vision.width),
            "qk_normalization": vision.qk_norm,
            "qkv_bias": vision.qkv_bias,
            "init_values": vision.layer_scale,
            "clip_embed_dim": cfg.embed_dim,
            "attn_pool_num_heads": cfg.pool_heads,
            "llama_config": _llama_config(cfg.qllama),
        }
    return {
        "architectures": ["InternVLModel"],
        "model_type": "internvl",
        "vision_config": _vision_config(cfg.vision),
        "qllama_config": {
            **_llama_config(cfg.qllama),
            "vision_hidden_size": cfg.vision.width,
            "num_query_token": cfg.queries,
            "cross_attention_frequency": cfg.qllama.cross_frequency,
        },
        "num_query_token": cfg.queries,
        "cross_attention_frequency": cfg.qllama.cross_frequency,
        "clip_embed_dim": cfg.embed_dim,
        "attn_pool_num_heads": cfg.pool_heads,
        "label_smoothing": 0.0,
    }


def _vision_config(cfg: VitConfig) -> dict[str, Any]:
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "num_channels": 3,
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.mlp_dim,
        "hidden_act": "gelu",
        "norm_type": {ours: name for name, ours in NORMS.items()}[cfg.norm],
        "qk_normalization": cfg.qk_norm,
        "qkv_bias": cfg.qkv_bias,
        "layer_norm_eps": cfg.eps,
        "initializer_factor": cfg.layer_scale,
        "drop_path_rate": cfg.drop_path,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "use_flash_attn": False,
    }


def _llama_config(cfg: LlamaConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.K,
        "head_dim": cfg.H,
        "intermediate_size": cfg.mlp_dim,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": cfg.tied_head,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": cfg.pad_id,
    }


def _ratio(mlp_dim: int, width: int) -> float:
    """The number that the official ``int(width * ratio)`` turns back into mlp_dim."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)


def _side(size: int | list[int]) -> int:
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ConfigError(f"The size {list(size)} is not square: only square tables are known.")
    return size[0]


def _only(config: Mapping[str, Any], key: str, value: str) -> None:
    if config.get(key, value) != value:
        raise ConfigError(f"{key}={config[key]!r} is not supported: only {value!r} is.")
