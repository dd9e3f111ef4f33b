"""Fingerprints: the same everywhere, different for any flipped bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax.checkpoint.integrity import (
    HostFingerprint,
    IntegrityError,
    fingerprint,
    fingerprints,
)

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int8", "uint8", "bool"]


def sample(shape, dtype, seed=0):
    x = np.random.default_rng(seed).normal(size=shape) * 3
    return np.asarray(jnp.asarray(x, jnp.float32).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_on_host_and_device(dtype):
    arrays = {str(s): sample(s, dtype) for s in [(), (0, 3), (5,), (4, 6, 2)]}
    on_host = fingerprints(arrays)
    assert on_host == fingerprints({name: jnp.asarray(x) for name, x in arrays.items()})


def test_the_value_is_fixed_across_versions():
    # Checkpoints on disk carry these numbers: they must never change.
    def scramble(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    plain = sum(i * (2 * i + 1) for i in range(6)) % 2**32
    scrambled = sum(scramble(i) * (scramble(i) | 1) for i in range(6)) % 2**32
    assert (plain, scrambled) == (0x7D, 0x1954E36D)
    assert fingerprint(np.arange(6, dtype=np.int32).reshape(2, 3)) == "0000007d1954e36d"


@pytest.mark.parametrize("rows, columns", [(8, 1), (2, 4), (1, 8), (1, 1)])
def test_the_same_on_every_mesh(mesh_of, rows, columns):
    mesh = mesh_of(rows, columns)
    x = sample((8, 16, 3), "bfloat16")
    for spec in [(), ("r",), (None, "c"), ("r", "c"), (("r", "c"),), (("c", "r"), None)]:
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert fingerprint(placed) == fingerprint(x), spec


def test_the_same_under_a_mesh_context_and_with_explicit_axes(mesh_of):
    x = sample((8, 16), "float32")
    explicit = jax.make_mesh((2, 4), ("a", "b"))
    with jax.set_mesh(mesh_of(4, 2)):
        placed = jax.device_put(x, NamedSharding(explicit, PartitionSpec("a", "b")))
        assert fingerprint(placed) == fingerprint(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_every_single_bit_counts(dtype):
    x = sample((3, 5), dtype)
    whole, seen = fingerprint(x), set()
    for bit in range(x.nbytes * 8):
        raw = bytearray(x.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        found = fingerprint(np.frombuffer(bytes(raw), x.dtype).reshape(x.shape))
        assert found[:8] != whole[:8] and found[8:] != whole[8:]
        seen.add(found)
    assert len(seen) == x.nbytes * 8


def test_order_and_shape_of_the_parts():
    x = np.arange(24, dtype=np.float32)
    assert fingerprint(x) != fingerprint(x[::-1].copy())
    host = HostFingerprint()
    for piece in np.split(x.reshape(4, 6), 4):
        host.update(piece)
    assert host.text() == fingerprint(x)


def test_changes_that_cancel_in_a_plain_sum():
    x = sample((64, 8), "float32")
    signs = x.copy()
    signs[[3, 40], [1, 5]] *= -1
    assert len({fingerprint(y) for y in (x, signs, -x, np.roll(x, 1), x[:, ::-1].copy())}) == 5


def test_no_collective_and_no_temporary(mesh):
    from internvl_jax.checkpoint.integrity import _sums

    x = jax.device_put(jnp.ones((64, 256)), NamedSharding(mesh, PartitionSpec("r", "c")))
    compiled = _sums.lower(x, x.sharding).compile()
    assert not {"all-reduce", "all-gather"} & set(compiled.as_text().replace("(", " ").split())
    assert compiled.memory_analysis().temp_size_in_bytes < 1024


def test_replicas_that_differ_are_noticed(mesh):
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    sharding = NamedSharding(mesh, PartitionSpec("r"))
    buffers = []
    for device, index in sharding.addressable_devices_indices_map(x.shape).items():
        part = x[index].copy()
        if device == jax.devices()[6]:
            part[1, 2] += 1e-6 * 64
        buffers.append(jax.device_put(part, device))
    torn = jax.make_array_from_single_device_arrays(x.shape, sharding, buffers)
    with pytest.raises(IntegrityError, match="different copies of leaf w;"):
        fingerprints({"fine": jnp.ones(3), "w": torn})


def test_what_has_no_fingerprint():
    with pytest.raises(TypeError, match="leaf rng is a PRNG key array; store"):
        fingerprints({"rng": jax.random.key(0)})
    with pytest.raises(TypeError, match="leaf a is float64"):
        fingerprints({"a": np.zeros(3)})
