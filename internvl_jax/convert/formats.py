"""The forms an exported model can take: how its tensors are named and what lies beside them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from internvl_jax.convert.key_maps import ModelConfig


@dataclasses.dataclass(frozen=True)
class About:
    """What is known of a model that is exported.

    Attributes:
        cfg: its architecture.
        stage: settings of the stage it comes from, as stored in the checkpoint; empty if unknown.
        data: settings of the data it was trained on, likewise (``template``, ``resize`` ...).
        dtype: of most of the exported tensors, ``float32``, ``bfloat16`` or ``float16``.
        tokenizer: its tokenizer's file (``.model`` or ``tokenizer.json``), where there is one.
        origin: which run and step it is, one sentence for a model card.
    """

    cfg: ModelConfig
    stage: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    tokenizer: Path | None = None
    origin: str = ""


Files = dict[str, "bytes | Path"]
"""What lies beside the weights: file name (may hold ``/``) -> content, or a file to copy."""


@dataclasses.dataclass(frozen=True)
class Format:
    """One form.

    Attributes:
        naming: see `key_maps.components`.
        writer: ``module:function`` below `internvl_jax.convert`, from `About` to `Files`.
    """

    naming: str
    writer: str

    def files(self, about: About) -> Files:
        """What lies beside the weights. Raises WeightsError for a model it has no place for."""
        module, function = self.writer.split(":")
        write: Callable[[About], Files] = getattr(
            importlib.import_module(f"internvl_jax.convert.{module}"), function
        )
        return write(about)


FORMATS: dict[str, Format] = {
    "official": Format("hf", "official:files"),
    "stage1": Format("plain", "official:stage1_files"),
    "plain": Format("runtime", "plain:files"),
    "hf-native": Format("native", "hf_native:files"),
    "remote-code": Format("remote", "remote_code:files"),
}
