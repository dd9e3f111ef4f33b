"""The ``config.json`` spellings of the official classes, and what lies beside such weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from internvl_jax.batch import MEAN, STD
from internvl_jax.convert.formats import About, Files
from internvl_jax.convert.from_torch import WeightsError
from internvl_jax.convert.key_maps import ModelConfig
from internvl_jax.convert.names import NORMS
from internvl_jax.convert.tokenizer_files import tokenizer_files
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig


def files(about: About) -> Files:
    """What lies beside the weights of an InternVL-14B or a bare InternViT folder.

    Args:
        about: a model of stage 1 or 2, or a tower.

    Returns:
        config.json, preprocessor_config.json and the tokenizer's files.

    Raises:
        WeightsError: for a dialogue model or a decoder, which have other forms.
    """
    return _files(about, "hf")


def stage1_files(about: About) -> Files:
    """As `files`, beside weights under the plain names of the stage-1 file."""
    return _files(about, "plain")


def _files(about: About, naming: str) -> Files:
    cfg = about.cfg
    if not isinstance(cfg, (InternVLConfig, VitConfig)):
        raise WeightsError(
            "The official form holds InternVL-14B and InternViT: export a dialogue model as "
            "hf-native, remote-code or plain."
        )
    vision = cfg if isinstance(cfg, VitConfig) else cfg.vision
    size = about.stage.get("image_size", vision.image_size)
    written: Files = {
        "config.json": to_json({**official_config(cfg, naming), "torch_dtype": about.dtype}),
        "preprocessor_config.json": preprocessor_config(size),
    }
    if isinstance(cfg, InternVLConfig):
        written |= tokenizer_files(about)
    return written


def official_config(cfg: InternVLConfig | VitConfig, naming: str) -> dict[str, Any]:
    """The ``config.json`` of an exported model, as the official classes read it.

    `architectures.model_config` is its inverse.

    Args:
        cfg: architecture.
        naming: ``hf`` or ``plain``.
    """
    if isinstance(cfg, VitConfig):
        return vision_config(cfg)
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
            "cross_attention_frequency": cfg.qllama.cross_frequency,
            "llama_config": decoder_config(cfg.qllama),
        }
    return {
        "architectures": ["InternVLModel"],
        "model_type": "internvl",
        "vision_config": vision_config(cfg.vision),
        "qllama_config": {
            **decoder_config(cfg.qllama),
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


def preprocessor_config(size: int) -> bytes:
    """preprocessor_config.json of the official folders, for pictures of `size` pixels a side."""
    return to_json(
        {
            "image_processor_type": "CLIPImageProcessor",
            "feature_extractor_type": "CLIPFeatureExtractor",
            "do_resize": True,
            "size": size,
            "resample": 3,
            "do_center_crop": True,
            "crop_size": size,
            "do_normalize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
        }
    )


def vision_config(cfg: VitConfig) -> dict[str, Any]:
    """InternVisionConfig of a tower."""
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


def decoder_config(cfg: LlamaConfig) -> dict[str, Any]:
    """The config of a decoder under the class of transformers that computes it.

    Raises:
        WeightsError: for biases and norms that no class of the family combines.
    """
    options: dict[str, Any] = {}
    if cfg.qk_norm and cfg.qkv_bias == cfg.out_bias:
        kind = "Qwen3"
    elif cfg.qkv_bias and not cfg.out_bias and not cfg.qk_norm:
        kind = "Qwen2"
    elif cfg.qkv_bias == cfg.out_bias:
        kind, options["mlp_bias"] = "Llama", False
    else:
        raise WeightsError(
            f"No decoder of transformers has qk_norm={cfg.qk_norm}, qkv_bias={cfg.qkv_bias} and "
            f"out_bias={cfg.out_bias} together: only the plain form can hold this model."
        )
    if kind != "Qwen2":
        options["attention_bias"] = cfg.qkv_bias
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
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
        **options,
    }


def dialogue(cfg: ModelConfig, form: str) -> ChatConfig:
    """The config, if InternVL's later chat classes can hold the model at all.

    Args:
        cfg: any architecture.
        form: name of the export format, for the message.

    Raises:
        WeightsError: for another model; the sentence names the forms that can hold it.
    """
    if not isinstance(cfg, ChatConfig):
        raise WeightsError(
            f"The form {form} holds dialogue models only: export a model of stage 1 or 2 as "
            "official or plain."
        )
    if cfg.qllama is not None or cfg.projector != "mlp1":
        found = "QLLaMA" if cfg.qllama is not None else f"the projector {cfg.projector}"
        raise WeightsError(
            f"The form {form} has no place for {found}, only for a tower, the projector mlp1 and "
            "a language model: export this model as plain."
        )
    return cfg


def to_json(content: Mapping[str, Any]) -> bytes:
    """A file's bytes."""
    return (json.dumps(content, indent=2) + "\n").encode()


def _ratio(mlp_dim: int, width: int) -> float:
    """The number that the official ``int(width * ratio)`` turns back into mlp_dim."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)
