"""What lies beside the weights of an official InternVL-14B, InternViT or stage-1 folder."""

from __future__ import annotations

import json

from internvl_jax.convert.architectures import official_config
from internvl_jax.convert.formats import About, Files
from internvl_jax.convert.shards import WeightsError
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig


def files(about: About) -> Files:
    """``config.json`` of the HF folder. Raises WeightsError for a dialogue model."""
    return _files(about, "hf")


def stage1_files(about: About) -> Files:
    """``config.json`` beside the plain stage-1 file. Raises WeightsError as `files`."""
    return _files(about, "plain")


def _files(about: About, naming: str) -> Files:
    cfg = about.cfg
    if not isinstance(cfg, InternVLConfig | VitConfig):
        raise WeightsError("Only InternVL and InternViT models have the official names.")
    config = official_config(cfg, naming) | {"torch_dtype": about.dtype}
    return {"config.json": (json.dumps(config, indent=2) + "\n").encode()}
