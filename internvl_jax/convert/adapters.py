"""Adapters of a fine-tuned model: merged into its weights, or alone in PEFT's form.

PEFT keeps ``lora_A`` [r, in] and ``lora_B`` [out, r] for each torch Linear
(https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.convert.key_maps import KeyMap, ModelConfig
from internvl_jax.convert.shards import WeightsError, write
from internvl_jax.convert.stream import Rows
from internvl_jax.convert.transpose import contiguous
from internvl_jax.convert.views import in_memory_name
from internvl_jax.models.adapters import adapter_scale
from internvl_jax.nn.lora import adapters, merged


class MergedRows(Rows):
    """A kernel and its adapter as one kernel, computed in float32 and rounded once."""

    def __init__(self, kernel: Rows, a: Rows, b: Rows, scale: float):
        self._kernel, self._a, self._b, self._scale = kernel, a, b, scale
        self.shape, self.dtype = kernel.shape, kernel.dtype

    def row(self, index: int | None) -> np.ndarray:
        kernel = self._kernel.row(index).astype(np.float32)
        return merged(kernel, self._a.row(index), self._b.row(index), self._scale)

    def finish(self) -> None:
        for part in (self._kernel, self._a, self._b):
            part.finish()


def merge(rows: Mapping[str, Rows], cfg: ModelConfig) -> dict[str, Rows]:
    """The same leaves without adapters: each kernel does what it and its adapter did together.

    Args:
        rows: leaves by path.
        cfg: their architecture, adapters included.
    """
    pairs = adapters(rows)
    alone = {path for pair in pairs.values() for path in pair}
    result = {path: leaf for path, leaf in rows.items() if path not in alone}
    for kernel, (a, b) in pairs.items():
        scale = adapter_scale(cfg, kernel)
        result[kernel] = MergedRows(rows[kernel], rows[a], rows[b], scale)
    return result


def write_peft(
    folder: Path,
    rows: Mapping[str, Rows],
    cfg: ModelConfig,
    keys: KeyMap,
    trained: Iterable[str],
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """Writes what a run with adapters trained, as PEFT reads it.

    ``adapter_model.safetensors`` and ``adapter_config.json`` hold the adapters and the modules that
    were trained whole, as the loaded classes call them. Trained parameters that belong to no torch
    module (queries, temperature) are in ``other_trained.safetensors``. Everything is float32.

    Args:
        folder: that exists.
        rows: leaves by path, adapters included.
        cfg: architecture, adapters included.
        keys: the naming's map of the architecture without them.
        trained: paths of the trained leaves.
        metadata: text for the headers.

    Returns:
        SHA-256 by file name.

    Raises:
        WeightsError: if there are no adapters.
    """
    pairs = adapters(rows)
    if not pairs:
        raise WeightsError("This run trained no adapters: export the model without --adapters.")
    # transformers' class saves itself under other names than its modules have.
    native = any(name.startswith("vision_tower.") for name in keys.entries)
    called = in_memory_name if native else lambda name: name
    inside: dict[str, np.ndarray] = {}
    alphas: dict[str, tuple[int, float]] = {}  # rank and alpha by torch module
    for kernel, (a, b) in pairs.items():
        for entry in keys.of(kernel):
            low = np.asarray(rows[a].row(entry.row), np.float32)
            high = np.asarray(rows[b].row(entry.row)[entry.within], np.float32)
            rank = low.shape[-1]
            module = called(entry.name).removesuffix(".weight")
            alphas[module] = rank, adapter_scale(cfg, kernel) * rank
            start = f"base_model.model.{module}"
            inside[f"{start}.lora_A.weight"] = contiguous(low.reshape(-1, rank).T)
            inside[f"{start}.lora_B.weight"] = contiguous(high.reshape(rank, -1).T)
    outside: dict[str, np.ndarray] = {}
    whole = set()
    for entry in (entry for path in trained if path in keys.ours for entry in keys.of(path)):
        value = np.asarray(rows[entry.path].row(entry.row), np.float32)[entry.within]
        x = contiguous(entry.how.to_official(np.asarray(value)))
        name = called(entry.name)
        module, _, leaf = name.rpartition(".")
        if module and leaf in ("weight", "bias"):
            inside[f"base_model.model.{name}"] = x
            whole.add(module)
        else:
            outside[name] = x
    for leaf in rows.values():
        leaf.finish()
    rank, alpha = next(iter(alphas.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(alphas),
        "modules_to_save": sorted(whole) or None,
        "rank_pattern": {re.escape(m): r for m, (r, _) in alphas.items() if r != rank},
        "alpha_pattern": {re.escape(m): x for m, (_, x) in alphas.items() if x != alpha},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    digests = {}
    for name, tensors in (("adapter_model", inside), ("other_trained", outside)):
        if tensors:
            layout = {n: (x.shape, x.dtype) for n, x in tensors.items()}
            values = (np.asarray(x, order="C") for x in tensors.values())
            header = {"format": "pt", **metadata}
            file = f"{name}.safetensors"
            digests[file] = write(folder / file, list(layout), layout, values, header)
    return digests
