"""A model's config seen from its adapters: what merging and exporting need to know."""

from __future__ import annotations

import dataclasses
from typing import Any

from internvl_jax.nn.lora import LoraConfig


def without_adapters(cfg: Any) -> Any:
    """The config of the same model once its adapters are merged, towers included."""
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    changed = {
        name: None if isinstance(value, LoraConfig) else without_adapters(value)
        for name, value in fields.items()
        if dataclasses.is_dataclass(value)
    }
    return dataclasses.replace(cfg, **changed)


def adapter_scale(cfg: Any, path: str) -> float:
    """What `nn.lora.merged` takes as scale for the kernel of a path, as ``vision/blocks/…``.

    Raises:
        ValueError: that tower has no adapters.
    """
    tower = getattr(cfg, path.split("/")[0], cfg)
    if not tower.lora:
        raise ValueError(f"{path}: the configuration has no adapters there.")
    return tower.lora.scale
