"""What lies beside the weights of an ``InternVLChatModel`` folder, but for its Python code.

The classes are OpenGVLab's (MIT licence) and none of this library's: engines that read the form
themselves (LMDeploy, SGLang) need nothing else, transformers and vLLM need the files
``configuration_*.py`` and ``modeling_*.py`` of a released folder copied beside.
"""

from __future__ import annotations

from internvl_jax.convert.formats import About, Files
from internvl_jax.convert.official import (
    decoder_config,
    dialogue,
    preprocessor_config,
    to_json,
    vision_config,
)
from internvl_jax.convert.tokenizer_files import special, tokenizer_files

# Our templates under the names of the official conversation table.
TEMPLATES = {"vicuna_v1": "vicuna_v1.1"}


def files(about: About) -> Files:
    """config.json, generation_config.json, preprocessor_config.json and the tokenizer's files.

    Args:
        about: a dialogue model with the projector ``mlp1``, of either pixel order.

    Returns:
        File name -> content.

    Raises:
        WeightsError: for a model this form cannot hold; the sentence names forms that can.
    """
    cfg = dialogue(about.cfg, "remote-code")
    pieces = special(about)
    size = about.stage.get("image_size", cfg.vision.image_size)
    template = about.data.get("template", "vicuna_v1")
    llm = decoder_config(cfg.llm)
    llm |= {"bos_token_id": pieces.bos and pieces.bos[1], "eos_token_id": pieces.eos[1]}
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        # A tied head lies in the weights as a copy, which the official loader expects.
        "llm_config": {**llm, "tie_word_embeddings": False, "torch_dtype": about.dtype},
        "vision_config": {**vision_config(cfg.vision), "torch_dtype": about.dtype},
        "tie_word_embeddings": False,
        "ps_version": cfg.unshuffle,
        "downsample_ratio": 0.5,
        "select_layer": cfg.select_layer,
        "force_image_size": size,
        "template": TEMPLATES.get(template, template),
        # One tile per picture, as in training.
        "dynamic_image_size": False,
        "use_thumbnail": False,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 1,
        "pad2square": about.data.get("resize") == "pad",
        "img_context_token_id": pieces.image[1],
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "torch_dtype": about.dtype,
    }
    return {
        "config.json": to_json(config),
        "generation_config.json": to_json({"eos_token_id": pieces.eos[1]}),
        "preprocessor_config.json": preprocessor_config(size),
        **tokenizer_files(about),
    }
