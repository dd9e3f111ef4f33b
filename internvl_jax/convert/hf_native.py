"""What lies beside the weights of an ``InternVLForConditionalGeneration`` folder.

transformers, vLLM and LMDeploy read such a folder without remote code. It holds a vision tower, the
``mlp1`` projector with the second pixel order, and a LLaMA, Qwen2 or Qwen3 decoder.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from internvl_jax.batch import MEAN, STD, TEMPLATES, Template
from internvl_jax.convert.formats import About, Files
from internvl_jax.convert.from_torch import WeightsError
from internvl_jax.convert.key_maps import ModelConfig
from internvl_jax.convert.names import NORMS
from internvl_jax.convert.official import decoder_config, dialogue, to_json
from internvl_jax.convert.tokenizer_files import CHAT_TEMPLATE, Special, special, tokenizer_files
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl_chat import ChatConfig


def cut(cfg: ChatConfig) -> tuple[ChatConfig, int]:
    """The same model without the vision layers that nothing reads.

    vLLM ignores ``vision_feature_layer``, so the layer that is read must be the last.

    Args:
        cfg: a model without QLLaMA, whose queries would read the last layer.

    Returns:
        The config with ``select_layer`` -1, and how many layers remain, the first ones. The map of
        names of that config reads them from the leaves of the whole model as well.
    """
    kept = cfg.vision.depth + 1 + cfg.select_layer
    vision = dataclasses.replace(cfg.vision, depth=kept)
    return dataclasses.replace(cfg, vision=vision, select_layer=-1), kept


def fitted(cfg: ModelConfig) -> ChatConfig:
    """The part of a model that such a folder holds. Raises WeightsError as `files`."""
    return cut(held(cfg))[0]


def files(about: About) -> Files:
    """Config, processor, chat template and tokenizer, for the model as `cut` leaves it.

    Args:
        about: a dialogue model; ``data.template`` names the template it was trained with, and
            ``stage.image_size`` its picture size.

    Returns:
        File name -> content.

    Raises:
        WeightsError: for a model this form cannot hold; the sentence names forms that can.
    """
    cfg, _ = cut(held(about.cfg))
    pieces = special(about)
    size = about.stage.get("image_size", cfg.vision.image_size)
    written: Files = {
        "config.json": to_json(config(cfg, about, pieces)),
        "generation_config.json": to_json(
            {
                "bos_token_id": pieces.bos and pieces.bos[1],
                "eos_token_id": pieces.eos[1],
                "pad_token_id": pieces.eos[1],
                "do_sample": False,
            }
        ),
        "preprocessor_config.json": to_json(
            {
                "image_processor_type": "GotOcr2ImageProcessor",
                "processor_class": "InternVLProcessor",
                # One tile per picture; the processor asks for tiles unless one is the most.
                "crop_to_patches": False,
                "min_patches": 1,
                "max_patches": 1,
                "do_resize": True,
                "size": {"height": size, "width": size},
                "resample": 3,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "do_convert_rgb": True,
                "image_mean": list(MEAN),
                "image_std": list(STD),
            }
        ),
        "video_preprocessor_config.json": to_json(
            {
                "video_processor_type": "InternVLVideoProcessor",
                "processor_class": "InternVLProcessor",
                "size": {"height": size, "width": size},
                "image_mean": list(MEAN),
                "image_std": list(STD),
            }
        ),
        "processor_config.json": to_json(
            {"processor_class": "InternVLProcessor", "image_seq_length": cfg.visual_tokens(size)}
        ),
    }
    if (jinja := _jinja(about, pieces)) is not None:
        written[CHAT_TEMPLATE] = jinja
    # The models trained here put nothing around a picture's tokens.
    around = {"start_image_token": "", "end_image_token": "", "video_token": "<video>"}
    return written | tokenizer_files(
        about,
        processor_class="InternVLProcessor",
        context_image_token=pieces.image[0],
        **around,
    )


def held(cfg: ModelConfig) -> ChatConfig:
    """The config, if this form can hold it. Raises WeightsError with the forms that can."""
    cfg = dialogue(cfg, "hf-native")
    if cfg.unshuffle != "v2":
        raise WeightsError(
            f"hf-native knows only the pixel order v2, and this model has {cfg.unshuffle}: export "
            "it as remote-code or plain."
        )
    return cfg


def config(cfg: ChatConfig, about: About, pieces: Special) -> dict[str, Any]:
    """InternVLConfig of a model without unused layers."""
    text = decoder_config(cfg.llm)
    text |= {"bos_token_id": pieces.bos and pieces.bos[1], "eos_token_id": pieces.eos[1]}
    size = about.stage.get("image_size", cfg.vision.image_size)
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text,
        "vision_config": vision_config(cfg.vision),
        "image_token_id": pieces.image[1],
        "image_seq_length": cfg.visual_tokens(size),
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        # The outer flag is on by default and the inner one off: both are said.
        "tie_word_embeddings": cfg.llm.tied_head,
        "torch_dtype": about.dtype,
    }


def vision_config(cfg: VitConfig) -> dict[str, Any]:
    """InternVLVisionConfig of a tower; sizes as lists, which vLLM asks for."""
    return {
        "architectures": ["InternVLVisionModel"],
        "model_type": "internvl_vision",
        "num_channels": 3,
        "image_size": [cfg.image_size, cfg.image_size],
        "patch_size": [cfg.patch_size, cfg.patch_size],
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.mlp_dim,
        "hidden_act": "gelu",
        "norm_type": {ours: name for name, ours in NORMS.items()}[cfg.norm],
        "use_qk_norm": cfg.qk_norm,
        "attention_bias": cfg.qkv_bias,
        "layer_norm_eps": cfg.eps,
        "layer_scale_init_value": cfg.layer_scale,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,  # no norm after the last block
        "attention_dropout": 0.0,
        "hidden_dropout_prob": 0.0,
        "projection_dropout": 0.0,
    }


def caveats(about: About) -> tuple[str, ...]:
    """What a model card has to say of such a folder, one sentence each."""
    cfg, pieces = held(about.cfg), special(about)
    found = [
        f"A picture's tokens have the id {pieces.image[1]} ({pieces.image[0]}) and nothing around "
        "them."
    ]
    if cfg.select_layer != -1:
        kept = cut(cfg)[1]
        found.append(
            f"The vision tower keeps its first {kept} layers of {cfg.vision.depth}: the model "
            f"reads layer {cfg.select_layer}."
        )
    name = about.data.get("template")
    if _beside(about) is None and name is None:
        found.append(
            "Nothing says which dialogue template it was trained with: chat_template.jinja is "
            "vicuna_v1's; replace it by the model's own where that is another."
        )
    elif _beside(about) is None and name not in TEMPLATES:
        found.append(
            f"It was trained with the dialogue template {name!r}, which is not known here: put the "
            "model's own chat_template.jinja beside this file."
        )
    resize = about.data.get("resize", "square")
    if resize != "square":
        found.append(
            f"Training prepared pictures with resize={resize!r}, which transformers' processor "
            "does not know: it stretches them, so bring them to a square yourself."
        )
    size = about.stage.get("image_size", cfg.vision.image_size)
    if size != cfg.vision.image_size:
        found.append(
            f"Training saw {size} px, the position table is for {cfg.vision.image_size} px: "
            "transformers interpolates it in every pass, other engines may not."
        )
    return tuple(found)


def _beside(about: About) -> Path | None:
    """The template that came with the weights, where training did not name one of ours."""
    if about.tokenizer is None or about.data.get("template") in TEMPLATES:
        return None
    path = about.tokenizer.parent / CHAT_TEMPLATE
    return path if path.is_file() else None


def _jinja(about: About, pieces: Special) -> bytes | Path | None:
    """chat_template.jinja; None where the model's template is not known."""
    if (path := _beside(about)) is not None:
        return path
    name = about.data.get("template", "vicuna_v1")
    return chat_template(TEMPLATES[name], pieces).encode() if name in TEMPLATES else None


_WORDS = """\
{%- macro words(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro pictures(content, text) -%}
{%- if content is not string -%}
{%- for part in content if part.type == 'image' -%}{{ text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
_ROLES = """\
{%- set ns = namespace(system=SYSTEM) -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set ns.system = words(message.content) | trim -%}
{%- elif message.role == 'user' -%}
{%- if ns.system -%}{{ ns.system ~ ' ' }}{%- set ns.system = '' -%}{%- endif -%}
{{- USER ~ ': ' -}}
{{- (pictures(message.content, IMAGE ~ '\\n') ~ (words(message.content) | trim)) | trim -}}
{{- ' ' ~ ASSISTANT ~ ':' -}}
{%- else -%}
{{- ' ' ~ (words(message.content) | trim) ~ eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
_CAPTIONS = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- pictures(message.content, IMAGE) -}}
{%- elif message.role == 'assistant' -%}
{{- (words(message.content) | trim) ~ '\\n' -}}
{%- endif -%}
{%- endfor -%}
"""


def chat_template(template: Template, pieces: Special) -> str:
    """A conversation template in Jinja: the text that `Template.segments` renders.

    Args:
        template: which.
        pieces: `image` stands for a picture; the processor repeats it.
    """
    words = {
        "SYSTEM": template.system,
        "USER": template.user,
        "ASSISTANT": template.assistant,
        "IMAGE": pieces.image[0],
    }

    def quoted(name: re.Match[str]) -> str:
        text = words[name[0]].replace("\\", "\\\\").replace("'", "\\'")
        return f"'{text}'"

    text = _WORDS + (_ROLES if template.roles else _CAPTIONS)
    return re.sub("|".join(words), quoted, text)
