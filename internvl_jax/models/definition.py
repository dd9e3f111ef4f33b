"""The pure boundary: a model is a graph definition and a flat table of named parameters.

Step, optimizer, checkpoint, sharding and conversion see nested dicts of arrays with stable paths
(``vision/blocks/layers/attn/qkv``); NNX modules exist only inside `Definition.merge`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from internvl_jax.nn.param import axes_of
from internvl_jax.sharding.rules import parameter_sharding
from internvl_jax.tree import flatten, unflatten

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Definition:
    """What a stage's model is, without its arrays.

    Attributes:
        build: makes the module from ``nnx.Rngs``.
        trainable: whether the parameter of a path is trained.
        graphdef: NNX's static half.
        variables: path -> NNX variable holding a ShapeDtypeStruct, with its axis names.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    trainable: Callable[[str], bool]
    graphdef: Any
    variables: dict[str, nnx.Variable]

    @classmethod
    def of(
        cls, build: Callable[[nnx.Rngs], nnx.Module], trainable: Callable[[str], bool]
    ) -> Definition:
        """Reads the structure from shapes alone; no parameter is allocated."""
        graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
        variables = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(state)}
        return cls(build, trainable, graphdef, variables)

    def merge(self, *trees: Mapping[str, Any]) -> Any:
        """Puts arrays into a module; the trees together hold every path exactly once."""
        leaves = {path: leaf for tree in trees for path, leaf in flatten(tree).items()}
        if leaves.keys() != self.variables.keys():
            odd = sorted(leaves.keys() ^ self.variables.keys())
            raise ValueError(f"Parameters do not match the model, first difference: {odd[0]}.")
        state = nnx.from_flat_state(
            {_keys(path): v.replace(leaves[path]) for path, v in self.variables.items()}
        )
        return nnx.merge(self.graphdef, state)

    def axes(self, path: str) -> tuple[str | None, ...]:
        """Logical axis names of a parameter, stacked layer axis included (as None)."""
        return axes_of(self.variables[path])

    def stacked(self, path: str) -> bool:
        """See `stacked`."""
        return stacked(path)

    def abstract(self, mesh: Mesh | AbstractMesh, frozen_dtype: Any) -> tuple[Tree, Tree]:
        """(trained, frozen) as ShapeDtypeStructs with shardings; trained parameters are float32."""
        trained, frozen = {}, {}
        for path, variable in self.variables.items():
            value = variable.get_value()
            sharding = parameter_sharding(path, value.shape, self.axes(path), mesh)
            tree, dtype = (trained, value.dtype) if self.trainable(path) else (frozen, frozen_dtype)
            tree[path] = jax.ShapeDtypeStruct(value.shape, dtype, sharding=sharding)
        return unflatten(trained), unflatten(frozen)

    def fresh(self, seed: int) -> Tree:
        """New parameters as one nested dict; traceable, so that only what is asked for is made."""
        flat = nnx.to_flat_state(nnx.state(self.build(nnx.Rngs(seed))))
        return unflatten({"/".join(map(str, path)): v.get_value() for path, v in flat})


def stacked(path: str) -> bool:
    """Whether the parameter of that path carries a leading layer axis."""
    return "/layers/" in f"/{path}"


def _keys(path: str) -> tuple[str | int, ...]:
    return tuple(int(k) if k.isdigit() else k for k in path.split("/"))
