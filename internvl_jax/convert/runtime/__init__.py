"""InternVL in PyTorch: an exported folder, loaded and served with torch and safetensors alone.

config    config.json as dataclasses
load      a folder -> its config and its model, strictly checked
vit       the vision tower
decoder   LLaMA with the family's options and QLLaMA's cross-attention
internvl  InternVL-C and -G: features, matching, captions
chat      the dialogue model
generate  greedy search, sampling (`beam`: beam search) on a static cache
image     picture files -> pixels, as the model was trained
text      texts and conversations -> token ids
engine    all of it behind one class, `Engine`
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Late: `python -m … --help` shall not wait for torch.
    if name == "Engine":
        from .engine import Engine

        return Engine
    if name == "Settings":
        from .generate import Settings

        return Settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
