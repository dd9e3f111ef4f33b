"""Names for the leaves of a state: any pytree <-> a flat dict of readable paths.

On disk a state is a nested dict of arrays whose paths read like ``params/vision/blocks/attn/qkv``
or ``opt/0/mu/vision/...``. Containers (NNX states, optax tuples) exist in memory only, so a
checkpoint outlives the classes that wrote it.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import jax

PyTree = Any


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def path_of(keypath: tuple[Any, ...]) -> str:
    """Spell a jax key path as ``a/b/c``, without the ``value`` level of an NNX variable.

    Args:
        keypath: key path as given by ``jax.tree_util.tree_flatten_with_path``.

    Returns:
        The path, components joined by ``/``.
    """
    names = [_name(key) for key in keypath]
    if keypath and keypath[-1] == jax.tree_util.GetAttrKey("value"):
        names = names[:-1]
    return "/".join(names)


def flatten(tree: PyTree) -> dict[str, Any]:
    """Flatten any pytree to ``{path: leaf}``.

    Args:
        tree: pytree of arrays or ``jax.ShapeDtypeStruct``.

    Returns:
        Leaves by path, in the tree's own order.

    Raises:
        ValueError: two leaves would get the same path.
    """
    pairs = [(path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    flat = dict(pairs)
    if len(flat) != len(pairs):
        twice = [p for p, n in collections.Counter(p for p, _ in pairs).items() if n > 1]
        raise ValueError(
            f"two leaves of the state have the same path {twice[0]!r}; rename one of them."
        )
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{path: leaf}`` into a nested dict.

    Args:
        flat: leaves by path.

    Returns:
        Nested dict with string keys.

    Raises:
        ValueError: a path is both a leaf and the parent of another leaf.
    """
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ValueError(f"path {path!r} runs through another leaf; rename one of them.")
        if last in node:
            raise ValueError(f"path {path!r} is also the parent of other leaves; rename one.")
        node[last] = leaf
    return nested


def like(tree: PyTree, flat: Mapping[str, Any]) -> PyTree:
    """Put ``{path: leaf}`` into the containers of ``tree``.

    Args:
        tree: pytree that gives the structure.
        flat: a leaf for every path of ``tree``.

    Returns:
        A pytree with the structure of ``tree`` and the leaves of ``flat``.
    """
    leaves = [flat[path] for path in flatten(tree)]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(tree), leaves)


def some(paths: Iterable[str], limit: int = 3) -> str:
    """Name the first few paths for an error sentence.

    Args:
        paths: paths to name.
        limit: how many are spelled out.

    Returns:
        For example ``a/b, a/c and 5 more``.
    """
    paths = list(paths)
    text = ", ".join(paths[:limit])
    return text + (f" and {len(paths) - limit} more" if len(paths) > limit else "")
