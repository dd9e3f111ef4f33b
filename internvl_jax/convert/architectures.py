"""Which model official weights are: from their ``config.json`` and, where it errs, their shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from internvl_jax.config import ConfigError
from internvl_jax.convert import from_names, llava, views
from internvl_jax.convert.key_maps import ModelConfig
from internvl_jax.convert.names import NORMS, Shape
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig

Shapes = Mapping[str, Shape]
# Which decoders have biases or norms that their config.json does not mention.
DECODERS: dict[str, dict[str, bool]] = {
    "llama": {},
    "llava": {},
    "llavallama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "internlm": {"qkv_bias": True, "out_bias": True},
    "internlm2": {"qkv_bias": True, "out_bias": True},
}
# Scaled rotary embeddings that change nothing up to the length the model was trained at.
UNSCALED = ("default", "dynamic")


def model_config(
    config: Mapping[str, Any] | None, names: Shapes | None = None
) -> tuple[ModelConfig, str]:
    """The architecture of official weights, recognised by their config and names.

    What a ``config.json`` leaves out has the value the official class gives it. Where the tensors
    contradict it, they win: position tables of another picture size, extended vocabularies, heads
    that are left out because they are tied.

    Args:
        config: parsed ``config.json`` of an InternVL-14B, InternViT, plain stage-1, LLaVA-style
            InternVL-Chat, InternVLChatModel, InternVLForConditionalGeneration, LLaMA, Qwen2, Qwen3,
            InternLM or InternLM2 folder; None where there is none.
        names: name -> shape of every tensor of the files, in their own spelling
            (`from_torch.Tensors.shapes`); None if only the config is there.

    Returns:
        Our config, and the naming its weights have (see `key_maps.components`) once they are read
        through `views.of`.

    Raises:
        ConfigError: one sentence, if it is none of these or asks for what we don't have.
    """
    names = {views.llama_name(name): shape for name, shape in (names or {}).items()}
    try:
        if config is None:
            return from_names.model_config(names)
        return _model_config(config, names)
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"config.json describes no model that can be built: {error}") from None


def _model_config(config: Mapping[str, Any], names: Shapes) -> tuple[ModelConfig, str]:
    # model_type "internvl" is no help: InternVL-14B and transformers' chat model both say it.
    if "qllama_config" in config:
        return _internvl(config, names), "hf"
    if "llama_config" in config:
        return _plain(config, names), "plain"
    if "llm_config" in config:
        return _chat(config, names), "remote"
    if "text_config" in config and "vision_config" in config:
        return _native_chat(config, names), "native"
    if any(key in config for key in ("mm_vision_tower", "mm_projector_type")):
        return llava.chat(config, llama(config, names), names)
    if config.get("model_type") == "internvl_vision":
        return native_vit(config, names), "native"
    if "qk_normalization" in config or config.get("model_type") == "intern_vit_6b":
        return vit(config, names), "hf"
    if "num_attention_heads" in config and "vocab_size" in config:
        return llama(config, names), "hf"
    # Reference folders hold a bare tower's config one level down.
    if "vision_config" in config:
        return vit(config["vision_config"], names), "hf"
    raise ConfigError(
        "config.json has none of qllama_config, llama_config, llm_config, text_config, "
        "vision_config, mm_vision_tower: it belongs to no model of the family that is known here."
    )


def vit(config: Mapping[str, Any], names: Shapes | None = None, prefix: str = "") -> VitConfig:
    """InternVisionConfig -> `VitConfig`.

    Args:
        config: the tower's part of a ``config.json``.
        names: name -> shape of the weights; the position table decides over ``image_size``.
        prefix: of the tower's names.
    """
    _only(config, "hidden_act", "gelu")
    cfg = VitConfig(
        image_size=_side(config.get("image_size", 224)),
        patch_size=_side(config.get("patch_size", 14)),
        width=config.get("hidden_size", 3200),
        depth=config.get("num_hidden_layers", 48),
        heads=config.get("num_attention_heads", 25),
        mlp_dim=config.get("intermediate_size", 12800),
        norm=_norm(config.get("norm_type", "rms_norm")),
        qk_norm=config.get("qk_normalization", True),
        qkv_bias=config.get("qkv_bias", False),
        eps=config.get("layer_norm_eps", 1e-6),
        layer_scale=config.get("initializer_factor", 0.1),
        drop_path=config.get("drop_path_rate", 0.0),
        drop_path_mode="linear",
    )
    return _as_its_table(cfg, names or {}, f"{prefix}embeddings.position_embedding")


def native_vit(
    config: Mapping[str, Any], names: Shapes | None = None, prefix: str = ""
) -> VitConfig:
    """transformers' InternVLVisionConfig -> `VitConfig`; arguments as of `vit`."""
    _only(config, "hidden_act", "gelu")
    for key in ("use_mean_pooling", "use_absolute_position_embeddings"):
        _only(config, key, True)
    cfg = VitConfig(
        image_size=_side(config.get("image_size", 448)),
        patch_size=_side(config.get("patch_size", 14)),
        width=config.get("hidden_size", 1024),
        depth=config.get("num_hidden_layers", 24),
        heads=config.get("num_attention_heads", 16),
        mlp_dim=config.get("intermediate_size", 4096),
        norm=_norm(config.get("norm_type", "layer_norm")),
        qk_norm=config.get("use_qk_norm", False),
        qkv_bias=config.get("attention_bias", False),
        eps=config.get("layer_norm_eps", 1e-6),
        layer_scale=config.get("layer_scale_init_value", 0.1),
    )
    return _as_its_table(cfg, names or {}, f"{prefix}embeddings.position_embeddings")


def llama(config: Mapping[str, Any], names: Shapes | None = None, prefix: str = "") -> LlamaConfig:
    """A decoder's config of the LLaMA family -> `LlamaConfig`.

    Args:
        config: the decoder's ``config.json``, or its part of one.
        names: name -> shape of the weights under LLaMA's names; the embedding decides over
            ``vocab_size``, and a head that is not there is tied.
        prefix: of the decoder's names.
    """
    names = names or {}
    _only(config, "hidden_act", "silu")
    _only(config, "use_sliding_window", False)
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    unnamed = "scaled" if config.get("rope_scaling") else "default"
    scaling = rope.get("rope_type", rope.get("type", unnamed))
    if scaling not in UNSCALED:
        raise ConfigError(
            f"rope_scaling is {scaling!r}: scaled rotary embeddings are not supported."
        )
    kind = _kind(config)
    bias = config.get("bias", config.get("attention_bias"))
    options: dict[str, Any] = dict(DECODERS[kind])
    if bias is not None and kind != "qwen2":
        options |= {"qkv_bias": bias, "out_bias": bias}
    pad = config.get("pad_token_id")
    vocabulary = config.get("vocab_size", 32000)
    embedding, head = f"{prefix}model.embed_tokens.weight", f"{prefix}lm_head.weight"
    if embedding in names:
        vocabulary = names[embedding][0]
        if pad is not None and pad >= vocabulary:
            pad = None
    return LlamaConfig(
        vocab_size=vocabulary,
        width=config.get("hidden_size", 4096),
        depth=config.get("num_hidden_layers", 32),
        heads=config.get("num_attention_heads", 32),
        kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        mlp_dim=config.get("intermediate_size", 11008),
        eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(config.get("rope_theta", rope.get("rope_theta", 1e4))),
        tied_head=config.get("tie_word_embeddings", False)
        or (embedding in names and head not in names and "tie_word_embeddings" not in config),
        pad_id=pad if pad is not None and pad >= 0 else None,
        **options,
    )


def _kind(config: Mapping[str, Any]) -> str:
    name = (config.get("architectures") or [config.get("model_type", "llama")])[0]
    kind = name.lower().removesuffix("forcausallm")
    if kind not in DECODERS:
        raise ConfigError(f"The decoder {name!r} is unknown: use one of {sorted(DECODERS)}.")
    return kind


def _qllama(config: Mapping[str, Any], **options: Any) -> LlamaConfig:
    # The official class hard-codes the base of its rotary embedding and pads with id 0.
    config = {"pad_token_id": 0, **config, "rope_theta": 1e4, "architectures": ["llama"]}
    return dataclasses.replace(llama(config), **options)


def _internvl(config: Mapping[str, Any], names: Shapes) -> InternVLConfig:
    vision = vit(config.get("vision_config", {}), names, "vision_model.")
    queries = config.get("num_query_token", 96)
    return InternVLConfig(
        vision=vision,
        qllama=_qllama(
            config["qllama_config"],
            cross_frequency=config.get("cross_attention_frequency", 2),
            vision_width=vision.width if queries else 0,
        ),
        queries=queries,
        embed_dim=config.get("clip_embed_dim", 768),
        pool_heads=config.get("attn_pool_num_heads", 16),
    )


def _plain(config: Mapping[str, Any], names: Shapes) -> InternVLConfig:
    width = config.get("embed_dim", 3200)
    vision = VitConfig(
        image_size=_side(config.get("img_size", 224)),
        patch_size=_side(config.get("patch_size", 14)),
        width=width,
        depth=config.get("depth", 48),
        heads=config.get("num_heads", 25),
        mlp_dim=int(width * config.get("mlp_ratio", 4)),
        qk_norm=config.get("qk_normalization", True),
        qkv_bias=config.get("qkv_bias", False),
        layer_scale=config.get("init_values", 0.1),
    )
    return InternVLConfig(
        vision=_as_its_table(vision, names, "pos_embed"),
        # QLLaMA's layout, so that stage 2 can begin from it.
        qllama=_qllama(
            config["llama_config"],
            head=False,
            cross_frequency=config.get("cross_attention_frequency", 2),
        ),
        queries=0,
        embed_dim=config.get("clip_embed_dim", 768),
        pool_heads=config.get("attn_pool_num_heads", 16),
    )


def _chat(config: Mapping[str, Any], names: Shapes) -> ChatConfig:
    _only(config, "downsample_ratio", 0.5)
    if config.get("use_backbone_lora") or config.get("use_llm_lora"):
        raise ConfigError("config.json asks for LoRA adapters: merge them before converting.")
    return ChatConfig(
        vision=vit(config["vision_config"], names, "vision_model."),
        llm=llama(config["llm_config"], names, "language_model."),
        projector="mlp1",
        unshuffle=config.get("ps_version", "v1"),
        select_layer=config.get("select_layer", -1),
    )


def _native_chat(config: Mapping[str, Any], names: Shapes) -> ChatConfig:
    _only(config, "downsample_ratio", 0.5)
    _only(config, "projector_hidden_act", "gelu")
    _only(config, "vision_feature_select_strategy", "default")
    names = {views.native_name(name): shape for name, shape in names.items()}
    vision = native_vit(config["vision_config"], names, "vision_tower.")
    # transformers ties by the outer flag, which is on unless something switches it off.
    flags = ({"tie_word_embeddings": True}, config["text_config"], config)
    tied = [c["tie_word_embeddings"] for c in flags if "tie_word_embeddings" in c][-1]
    text = {**config["text_config"], "tie_word_embeddings": tied}
    layers = config.get("vision_feature_layer", -1)
    layer = layers[0] if isinstance(layers, list) and len(layers) == 1 else layers
    if not isinstance(layer, int):
        raise ConfigError(f"vision_feature_layer={layers} names several layers: only one is read.")
    return ChatConfig(
        vision=vision,
        llm=llama(text, names, "language_model."),
        projector="mlp1",
        unshuffle="v2",
        # hidden_states holds the embeddings first: index 0..depth counts from them.
        select_layer=layer if layer < 0 else layer - vision.depth - 1,
    )


def _as_its_table(cfg: VitConfig, names: Shapes, name: str) -> VitConfig:
    """The tower with the picture size that its position table is for."""
    if name not in names:
        return cfg
    return dataclasses.replace(cfg, image_size=from_names.table_side(names, name) * cfg.patch_size)


def _norm(name: str) -> str:
    if name not in NORMS:
        raise ConfigError(
            f"norm_type={name!r} of the vision tower is unknown: use {sorted(NORMS)}."
        )
    return NORMS[name]


def _side(size: int | list[int]) -> int:
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ConfigError(f"The size {list(size)} is not square: only square tables are known.")
    return size[0]


def _only(config: Mapping[str, Any], key: str, value: Any) -> None:
    if config.get(key, value) != value:
        raise ConfigError(f"{key}={config[key]!r} is not supported: only {value!r} is.")
