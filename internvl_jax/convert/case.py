"""A folder of stored inputs, weights and outputs of an official model, and ours beside it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.convert import views
from internvl_jax.convert.architectures import model_config
from internvl_jax.convert.from_torch import Tensors, load
from internvl_jax.convert.key_maps import KeyMap, definition, key_map
from internvl_jax.models.compute import Compute
from internvl_jax.models.definition import Definition
from internvl_jax.tree import flatten

EXACT = Compute(dtype="float32", remat="none")
Arrays = dict[str, np.ndarray]
# What a case of the later models (their config.json is the bare official one, their kind is in
# meta.json, their tensors have no prefix) gives to the model; everything else came out of it.
FAMILY_INPUTS = frozenset(
    ("pixel_values", "input_ids", "attention_mask", "labels", "image_flags", "loss_weight")
)
UNSUPPORTED = {
    "hf_v2pe": "V2PE's fractional positions are not supported: only whole positions are.",
}


class CaseError(ValueError):
    """A folder that is no case; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One reference folder.

    Attributes:
        folder: with ``config.json``, ``weights.safetensors`` and ``io.safetensors``.
        kind: which computation was stored.
        config: the official model's config, and whatever else the kind needs.
        inputs, outputs: the tensors under ``in/`` and ``out/``, without that prefix. What a further
            file ``io_VARIANT.safetensors`` holds is found under ``VARIANT/``.
        meta: what ``meta.json`` says, for the later models.
        scales: magnitudes to judge errors by where a tensor's own says little; see `verify`.
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    inputs: Arrays
    outputs: Arrays
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    scales: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> Case:
        """Reads a folder. Raises CaseError if it is none, WeightsError if a file is damaged."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CaseError(
                f"{folder} is not a folder: give one with config.json and two safetensors files."
            )
        kind, config, meta = _described(folder)
        if kind in UNSUPPORTED:
            raise CaseError(f"{folder} cannot be compared: {UNSUPPORTED[kind]}")
        for name in ("weights.safetensors", "io.safetensors"):
            _needed(folder, name)
        tensors = Tensors(folder / "io.safetensors")
        if meta:
            inputs = {n: tensors[n] for n in tensors if n in FAMILY_INPUTS}
            outputs = {n: tensors[n] for n in tensors if n not in FAMILY_INPUTS}
            return cls(folder, kind, config, inputs, outputs, meta)
        inputs = {n[3:]: tensors[n] for n in tensors if n.startswith("in/")}
        outputs = {n[4:]: tensors[n] for n in tensors if n.startswith("out/")}
        for further in sorted(folder.glob("io_*.safetensors")):
            variant, extra = further.stem.removeprefix("io_"), Tensors(further)
            outputs |= {f"{variant}/{n[4:]}": extra[n] for n in extra if n.startswith("out/")}
        if not outputs:
            raise CaseError(
                f"{folder}/io.safetensors holds no out/ tensor: there is nothing to compare."
            )
        return cls(folder, kind, config, inputs, outputs)

    def input(self, name: str) -> np.ndarray:
        """One stored input. Raises CaseError where the case lacks it."""
        if name not in self.inputs:
            raise CaseError(
                f"{self.folder}/io.safetensors lacks {'' if self.meta else 'in/'}{name}, which "
                f"{self.kind!r} needs."
            )
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
    def architecture(self) -> tuple[Any, str]:
        """Our config of the official model, and its naming."""
        return model_config(self.config, self.weights.shapes)

    @functools.cached_property
    def weights(self) -> Tensors:
        """The stored weights, unread."""
        return Tensors(self.folder / "weights.safetensors")

    @functools.cached_property
    def named(self) -> Mapping[str, np.ndarray]:
        """The stored weights under the names of `keys`."""
        return views.of(self.weights, *self.architecture)

    @functools.cached_property
    def keys(self) -> KeyMap:
        """The two-way map of names."""
        return key_map(*self.architecture)

    @functools.cached_property
    def parameters(self) -> dict[str, jax.Array]:
        """The stored weights, which must fit the model exactly, as our parameters by path."""
        cfg, naming = self.architecture
        views.check(self.named, self.keys.shapes)
        return parameters(load(self.named, cfg, naming, keys=self.keys))

    @functools.cached_property
    def definition(self) -> Definition:
        """Our model in float32, without arrays."""
        return definition(self.architecture[0], EXACT)

    def model(self) -> Any:
        """Our model with the stored weights."""
        return self.definition.merge(self.parameters)

    def run(self, function: Callable[..., Mapping[str, jax.Array]]) -> Arrays:
        """Compiles and calls ``function(model)``; the result as numpy arrays."""
        return self.compiled(function)()

    def compiled(self, function: Callable[..., Mapping[str, jax.Array]]) -> Callable[..., Arrays]:
        """``function(model, *arguments)`` as a compiled function of the arguments."""
        jitted = jit(lambda params, *rest: function(self.definition.merge(params), *rest))
        return lambda *rest: jax.tree.map(np.asarray, jitted(self.parameters, *rest))

    def differentiate(
        self, function: Callable[[Any], tuple[jax.Array, Any]]
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """Compiles ``function(model) -> (scalar, others)`` with its gradient.

        Returns:
            The pair of (scalar, others), and the gradient of the scalar by parameter path.
        """
        objective = lambda params: function(self.definition.merge(params))
        result = jit(jax.value_and_grad(objective, has_aux=True))(self.parameters)
        return jax.tree.map(np.asarray, result)

    def gradients(self, gradient: Mapping[str, np.ndarray], prefix: str = "grad") -> Arrays:
        """Our gradient by path -> ``grad/NAME`` and ``grad_norm/NAME`` of every official tensor."""
        result: Arrays = {}
        for name in self.keys.entries:
            tensor = self.keys.to_official(gradient, name)
            result[f"{prefix}/{name}"] = tensor
            squares = np.sum(np.square(tensor, dtype=np.float64))
            result[f"{prefix}_norm/{name}"] = np.asarray(np.sqrt(squares))
        return result


def _described(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A case's kind, the official config, and for the later models what meta.json says."""
    path = _needed(folder, "config.json")
    try:
        parsed = json.loads(path.read_text())
        if "case" in parsed or not (folder / "meta.json").is_file():
            return parsed["case"], parsed["config"], {}
        path = folder / "meta.json"
        meta = json.loads(path.read_text())
        return meta["kind"], parsed, meta
    except (ValueError, KeyError, TypeError) as error:
        raise CaseError(f"{path} names no case and config: {error!r}") from None


def _needed(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise CaseError(f"{folder} lacks {name}: it is not a reference case.")
    return folder / name


def jit(function: Callable) -> Callable:
    """`jax.jit`; on a CPU with the least optimisation, as each function is called once or twice."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


def parameters(tree: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Nested numpy parameters -> device arrays by path."""
    return {path: jnp.asarray(leaf) for path, leaf in flatten(tree).items()}
