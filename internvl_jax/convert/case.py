"""A folder of stored inputs, weights and outputs of an official model, and ours beside it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from internvl_jax.checkpoint.tree import flatten
from internvl_jax.convert.architectures import model_config
from internvl_jax.convert.from_torch import Tensors, load, module
from internvl_jax.convert.key_maps import KeyMap, ModelConfig, key_map
from internvl_jax.models.compute import Compute

EXACT = Compute(dtype="float32", remat="none")
Arrays = dict[str, np.ndarray]


class CaseError(ValueError):
    """A folder that is no case; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One reference folder.

    Attributes:
        folder: with ``config.json``, ``weights.safetensors`` and ``io.safetensors``.
        kind: which computation was stored.
        config: the official model's config, and whatever else the kind needs.
        inputs, outputs: the tensors under ``in/`` and ``out/``, without that prefix.
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    inputs: Arrays
    outputs: Arrays

    @classmethod
    def read(cls, folder: str | Path) -> Case:
        """Reads a folder. Raises CaseError if it is none, WeightsError if a file is damaged."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CaseError(f"{folder} is not a folder: give one with config.json and two safetensors files.")
        for name in ("config.json", "weights.safetensors", "io.safetensors"):
            if not (folder / name).is_file():
                raise CaseError(f"{folder} lacks {name}: it is not a reference case.")
        try:
            parsed = json.loads((folder / "config.json").read_text())
            kind, config = parsed["case"], parsed["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise CaseError(f"{folder}/config.json names no case and config: {error!r}") from None
        tensors = Tensors(folder / "io.safetensors")
        inputs = {n[3:]: tensors[n] for n in tensors if n.startswith("in/")}
        outputs = {n[4:]: tensors[n] for n in tensors if n.startswith("out/")}
        if not outputs:
            raise CaseError(f"{folder}/io.safetensors holds no out/ tensor: there is nothing to compare.")
        return cls(folder, kind, config, inputs, outputs)

    def input(self, name: str) -> np.ndarray:
        """One stored input. Raises CaseError where the case lacks it."""
        if name not in self.inputs:
            raise CaseError(f"{self.folder}/io.safetensors lacks in/{name}, which {self.kind!r} needs.")
        return self.inputs[name]

    def images(self, name: str = "pixel_values") -> jax.Array:
        """Stored images, channels last: float32 [B, h, w, 3]."""
        return jnp.asarray(self.input(name).transpose(0, 2, 3, 1))

    def ids(self, name: str) -> jax.Array:
        """Stored token ids, int32."""
        return jnp.asarray(self.input(name), jnp.int32)

    def mask(self, name: str) -> jax.Array:
        """A stored attention mask, bool."""
        return jnp.asarray(self.input(name)) != 0

    @functools.cached_property
    def architecture(self) -> tuple[ModelConfig, str]:
        """Our config of the official model, and its naming."""
        return model_config(self.config)

    @functools.cached_property
    def keys(self) -> KeyMap:
        """The two-way map of names."""
        return key_map(*self.architecture)

    def model(self) -> Any:
        """Our model with the stored weights, which must fit it exactly."""
        cfg, naming = self.architecture
        params = load(self.folder / "weights.safetensors", cfg, naming, keys=self.keys)
        return module(cfg, params, EXACT)

    def gradients(self, gradient: nnx.State, prefix: str = "grad", norm: str = "grad_norm") -> Arrays:
        """A gradient of the whole model under official names, whole and as norms."""
        return official_gradients(self.keys, flatten(gradient), prefix, norm)


def official_gradients(keys: KeyMap, flat: Mapping[str, Any], prefix: str, norm: str) -> Arrays:
    """Our gradients by path -> ``prefix/NAME`` and ``norm/NAME`` of every official tensor."""
    host = {path: np.asarray(leaf) for path, leaf in flat.items()}
    result: Arrays = {}
    for name in keys.entries:
        gradient = keys.to_official(host, name)
        result[f"{prefix}/{name}"] = gradient
        result[f"{norm}/{name}"] = np.sqrt(np.sum(np.square(gradient, dtype=np.float64)))
    return result


def numpy(tree: Mapping[str, Any]) -> Arrays:
    """Device arrays to numpy."""
    return {name: np.asarray(x) for name, x in tree.items()}
