"""Fingerprints of arrays: Orbax hands back flipped bits silently, so every leaf carries a number.

A leaf's fingerprint is two 32-bit sums over its elements: each element's bits as an unsigned
integer, in the second sum scrambled by a bijection, times an odd weight that depends on its
position in the whole, unsharded array. All arithmetic is modulo 2**32, so the order of summation
and therefore the mesh don't matter, and any change of a single element changes both sums (an odd
number is invertible). The bijection is for changes that would cancel, such as two flipped signs.
It guards against accidents, not against an adversary. Arrays of more than 2**32 elements repeat
the weights.

Every device sums its own shard and the host adds up: no collective runs, so any number of leaves
can be in flight, and the sums of replicas can be compared.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_CHUNK = 1 << 16  # elements summed at a time on the host: what stays in the cache
_COMPILED_CHUNK = 1 << 20  # the same where XLA sums on the host


class IntegrityError(ValueError):
    """An array is not what it should be: stored bits changed, or replicas disagree."""


def _scramble(x):
    """A bijection of uint32 (Wellons' lowbias32); the same code serves numpy and jax."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _terms(words, index):
    """What each element adds to the two sums."""
    one = np.uint32(1)
    return words * (index * np.uint32(2) + one), _scramble(words) * (_scramble(index) | one)


def _bits(dtype: Any) -> str:
    return f"uint{np.dtype(dtype).itemsize * 8}"


def _lanes(x: jax.Array, shape: tuple[int, ...], starts: list[Any]) -> jax.Array:
    """Sums [2] uint32 over ``x``, which begins at ``starts`` in an array of ``shape``."""
    words = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, _bits(x.dtype))
    words = words.astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, start in enumerate(starts):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        position = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + start
        index += position * stride
    zero = jnp.uint32(0)
    # One reduction for both lanes: XLA fuses it into a single pass without temporaries.
    lanes = jax.lax.reduce(
        _terms(words, index),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(x.ndim)),
    )
    return jnp.stack(lanes)


@functools.partial(jax.jit, static_argnums=1)
def _sums(x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """Sums [devices, 2] uint32, row d of the shard that device d holds."""
    if not isinstance(sharding, NamedSharding):
        return _lanes(x, x.shape, [np.uint32(0)] * x.ndim)[None]
    spec = tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))

    def local(shard: jax.Array) -> jax.Array:
        starts = [
            np.uint32(0)
            if not axes
            else jax.lax.axis_index(axes).astype(jnp.uint32) * np.uint32(shard.shape[axis])
            for axis, axes in enumerate(spec)
        ]
        return _lanes(shard, x.shape, starts)[None]

    everywhere = PartitionSpec(sharding.mesh.axis_names)
    return jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=sharding.spec,
        out_specs=everywhere,
        check_vma=False,
    )(x)


@jax.jit
def _chunk_lanes(words: jax.Array, first: jax.Array) -> jax.Array:
    """Sums [2] uint32 over elements that lie one after another in an array, from `first` on."""
    return _lanes(words, words.shape, [first])


_stack = jax.jit(lambda *rows: jnp.stack(rows))


def _mesh_of(x: jax.Array) -> contextlib.AbstractContextManager[Any]:
    """Leave whatever mesh the caller has set: an array brings its own."""
    if isinstance(x.sharding, NamedSharding) and isinstance(x.sharding.mesh, Mesh):
        return jax.set_mesh(x.sharding.mesh)
    return contextlib.nullcontext()


def _device_sums(arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Sums [2, 2] uint32 on this process: over the first replica, and over all replicas."""
    groups: dict[Any, dict[str, jax.Array]] = {}
    for path, x in arrays.items():
        with _mesh_of(x):
            sums = _sums(x, x.sharding)
        groups.setdefault(sums.sharding, {})[path] = sums
    found = {path: np.zeros((2, 2), np.uint32) for path in arrays}
    for group in groups.values():
        replica = {p: {s.device: s.replica_id for s in arrays[p].addressable_shards} for p in group}
        with _mesh_of(next(iter(group.values()))):
            table = _stack(*group.values())
        for shard in table.addressable_shards:  # one transfer per device
            for path, row in zip(group, np.asarray(shard.data)[:, 0], strict=True):
                found[path][1] += row
                if replica[path][shard.device] == 0:
                    found[path][0] += row
    return found


class HostFingerprint:
    """Fingerprint of an array that passes by in pieces, each a run of its row-major elements."""

    def __init__(self) -> None:
        self._sums = np.zeros(2, np.uint32)
        self._seen = 0

    def update(self, piece: np.ndarray, at: int | None = None) -> None:
        """Add some elements.

        Args:
            piece: their values.
            at: how many elements of the array come before them; by default as many as were added,
                so that pieces may simply follow one another.
        """
        begin = self._seen if at is None else at
        flat = np.ascontiguousarray(piece).reshape(-1).view(_bits(piece.dtype))
        compiled = 0
        # Three times as fast; but a process that may hold an accelerator must not open it for this.
        if jax.config.values["jax_platforms"] == "cpu":
            compiled = flat.size - flat.size % _COMPILED_CHUNK
        for start in range(0, compiled, _COMPILED_CHUNK):
            first = np.uint32((begin + start) % 2**32)
            self._sums += np.asarray(_chunk_lanes(flat[start : start + _COMPILED_CHUNK], first))
        for start in range(compiled, flat.size, _CHUNK):
            words = flat[start : start + _CHUNK].astype(np.uint32)
            first = begin + start
            index = np.arange(first, first + words.size, dtype=np.uint64).astype(np.uint32)
            self._sums += np.stack([np.sum(t, dtype=np.uint32) for t in _terms(words, index)])
        self._seen += flat.size

    def text(self) -> str:
        """The fingerprint of all elements so far.

        Returns:
            16 hexadecimal digits, as :func:`fingerprint` gives for the whole array.
        """
        return _text(self._sums)


def _text(sums: np.ndarray) -> str:
    return f"{int(sums[0]):08x}{int(sums[1]):08x}"


def _replicas(x: jax.Array) -> int:
    shards = x.size // math.prod(x.sharding.shard_shape(x.shape))
    return x.sharding.num_devices // shards


def _check(path: str, x: jax.Array | np.ndarray) -> None:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(f"leaf {path} is a PRNG key array; store jax.random.key_data of it.")
    if np.dtype(x.dtype).itemsize > 4 or np.dtype(x.dtype).kind not in "biufV":
        raise TypeError(
            f"leaf {path} is {np.dtype(x.dtype)}; a checkpoint holds bool, integer and "
            "floating-point arrays of at most 32 bits per element."
        )
    if not isinstance(x, jax.Array) or isinstance(x.sharding, NamedSharding):
        return
    if x.sharding.num_devices > 1 or jax.process_count() > 1:
        raise TypeError(
            f"leaf {path} has a {type(x.sharding).__name__}; place it on the mesh "
            "(a NamedSharding) so that every process agrees where it lives."
        )


def fingerprint(x: jax.Array | np.ndarray) -> str:
    """Fingerprint of one array, computed where the array lives.

    Args:
        x: array of any shape, sharded or not; bool, integer or float of at most 32 bits.

    Returns:
        16 hexadecimal digits; the same on every mesh, unsharded, and for a numpy copy.

    Raises:
        TypeError: the array has no fingerprint (PRNG keys, 64-bit types).
        IntegrityError: copies of the array on different devices differ.
    """
    return fingerprints({"(unnamed)": x})["(unnamed)"]


def fingerprints(flat: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
    """Fingerprints of many arrays: all are dispatched before the first one is awaited.

    With several processes all must call this, with the same paths in the same order.

    Args:
        flat: arrays by path.

    Returns:
        Fingerprint by path, 16 hexadecimal digits each.

    Raises:
        TypeError: an array has no fingerprint.
        IntegrityError: replicas of a leaf differ between devices.
    """
    for path, x in flat.items():
        _check(path, x)
    on_device = {p: x for p, x in flat.items() if isinstance(x, jax.Array) and x.size}
    sums = _device_sums(on_device)
    if on_device and jax.process_count() > 1:
        parts = np.asarray(multihost_utils.process_allgather(np.stack(list(sums.values()))))
        totals = np.add.reduce(parts, axis=0, dtype=np.uint32)
        sums = {path: totals[row] for row, path in enumerate(sums)}
    found = {}
    for path in flat.keys() - on_device.keys():
        host = HostFingerprint()
        host.update(np.asarray(flat[path]))
        found[path] = host.text()
    torn = []
    for path, (first, everywhere) in sums.items():
        found[path] = _text(first)
        if np.any(everywhere != first * np.uint32(_replicas(on_device[path]))):
            torn.append(path)
    if torn:
        raise IntegrityError(
            f"the devices hold different copies of leaf {torn[0]}"
            + (f" (and of {len(torn) - 1} more)" if len(torn) > 1 else "")
            + "; a chip or its memory is faulty: restart from the last checkpoint without it."
        )
    return {path: found[path] for path in flat}


def describe(x: Any) -> str:
    """Dtype and shape for a sentence, as ``float32[3,4]``.

    Args:
        x: anything with ``shape`` and ``dtype``.

    Returns:
        The description.
    """
    return f"{np.dtype(x.dtype)}[{','.join(map(str, x.shape))}]"
