"""Asks transformers' own InternVLVisionModel whether an exported vision tower is right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.convert.architectures import model_config
from internvl_jax.convert.from_torch import Tensors, load, module
from internvl_jax.convert.hf_native import vision_config
from internvl_jax.convert.key_maps import VitConfig, key_map
from internvl_jax.models.compute import Compute
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.tree import flatten


def available() -> bool:
    """Whether torch and transformers are installed; neither is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def check_vision_with_transformers(folder: str | Path, images: np.ndarray) -> float:
    """Loads an exported tower into transformers and compares it with ours.

    Args:
        folder: an exported InternVL or InternViT folder (see `to_torch.export`).
        images: float32 [B, S, S, 3], normalised, S the tower's native size.

    Returns:
        Largest absolute difference of the last hidden states, both in float32.

    Raises:
        ImportError: without torch and transformers (the ``torch`` extra).
        WeightsError: if the folder's weights do not fit its config.
    """
    import torch
    from transformers import InternVLVisionConfig, InternVLVisionModel

    folder = Path(folder)
    cfg, naming = model_config(json.loads((folder / "config.json").read_text()))
    params = load(Tensors(folder), cfg, naming)
    if isinstance(cfg, InternVLConfig):
        cfg, params = cfg.vision, params["vision"]
    if not isinstance(cfg, VitConfig):
        raise ValueError(f"{folder} holds no vision tower that can be compared.")

    keys = key_map(cfg, "native")
    flat = flatten(params)
    weights = {name: torch.from_numpy(keys.to_official(flat, name)) for name in keys.entries}
    options: dict[str, Any] = {**vision_config(cfg), "attn_implementation": "eager"}
    theirs = InternVLVisionModel(InternVLVisionConfig(**options))
    theirs.load_state_dict(weights, strict=True)
    with torch.no_grad():
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32))
        reference = theirs.eval().float()(pixel_values=pixels).last_hidden_state.numpy()
    ours = module(cfg, params, Compute(dtype="float32", remat="none"))
    with jax.default_matmul_precision("highest"):
        tokens = np.asarray(ours(jnp.asarray(images, jnp.float32)).tokens)
    return float(np.max(np.abs(tokens - reference)))
