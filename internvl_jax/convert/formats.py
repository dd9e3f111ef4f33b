"""The forms an exported model can take: how its tensors are named and what lies beside them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
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
        module: below `internvl_jax.convert`; its function ``files`` gives from `About` the `Files`,
            and may refuse the model with a WeightsError. Where it has them, ``fitted`` gives the
            part of an architecture that the form holds, and ``caveats`` sentences for its card.
        files_of: another name of that function.
    """

    naming: str
    module: str
    files_of: str = "files"

    def files(self, about: About) -> Files:
        """What lies beside the weights."""
        return getattr(self._module(), self.files_of)(about)

    def fitted(self, cfg: ModelConfig) -> ModelConfig:
        """The part of an architecture that is written."""
        return getattr(self._module(), "fitted", lambda cfg: cfg)(cfg)

    def caveats(self, about: About) -> tuple[str, ...]:
        """What whoever uses the folder must know."""
        return getattr(self._module(), "caveats", lambda about: ())(about)

    def _module(self) -> Any:
        return importlib.import_module(f"internvl_jax.convert.{self.module}")


FORMATS: dict[str, Format] = {
    "official": Format("hf", "official"),
    "stage1": Format("plain", "official", "stage1_files"),
    "plain": Format("runtime", "plain"),
    "hf-native": Format("native", "hf_native"),
    "remote-code": Format("remote", "remote_code"),
}
