"""Self-attention over short rows on TPUs: Pallas kernels that keep a row's logits on the chip.

With a hundred keys, attention is bound by memory: its logits, their way to memory and back, and the
copies around them take far longer than its products. These kernels read q, k and v once and write
o; the backward pass reads q, k, v and do and writes dq, dk and dv. It computes the softmax again:
nothing but q, k and v is kept for it. They rotate q and k (RoPE) on the way, if asked to.

They read and write [T, N, B, H], which is how XLA lays out [B, T, N, H] in memory where it may
choose and B is large (some hundred rows a device; with few, it copies): B fills whole tiles when T
does not. A block is a head of some rows, and one of its rows is every so many sublanes: a strided
load takes it out, and nothing is transposed. bfloat16 rows lie in pairs in 32-bit words.

In the kernels, tokens fill up to whole tiles: to `_TILE` rows, and to `_LANES` lanes of logits.
What lies behind the last token of a block is undefined, and is set to zero.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from internvl_jax.sharding.mesh import platform
from internvl_jax.sharding.rules import map_shards

FORWARD, BACKWARD = "short_attention_forward", "short_attention_backward"

_LANES, _TILE = 128, 16
_BUDGET = 10 * 2**20
"""Bytes of blocks, each twice: one is computed on while the next is on its way."""

Tables = tuple[jax.Array, jax.Array]


def fill(length: int) -> tuple[int, int]:
    """Tokens of a row as the kernels' rows and as their lanes: 99 -> (112, 128)."""
    return -(-length // _TILE) * _TILE, -(-length // _LANES) * _LANES


def short_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array | None = None,
    *,
    causal: bool = False,
    rope: Tables | None = None,
) -> jax.Array:
    """Scaled dot-product attention of short rows over themselves.

    Args:
        q: [B, T, N, 128].
        k: the same, as many heads as q.
        v: the same.
        keys: bool [B, T], False on padding; None for no padding.
        causal: keys after the query's own position are masked as well.
        rope: cosines and sines [B|1, T, 1, 64] that q and k are rotated by; they have no gradient.

    Returns:
        [B, T, N, 128] in q's dtype. A query without any key attends uniformly.
    """
    # Cosines and sines side by side: one array without padding.
    tables = None
    if rope is not None:
        tables = jnp.concatenate(rope, axis=-1)[:, :, 0]
        tables = jnp.broadcast_to(tables, (len(q), *tables.shape[1:])).astype(jnp.float32)
    return _attention(q, k, v, keys, tables, causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q: Any, k: Any, v: Any, keys: Any, tables: Any, causal: bool) -> jax.Array:
    return _sharded(_Call(FORWARD, 1, 2), (q, k, v), keys, tables, causal)[0]


def _forward(q: Any, k: Any, v: Any, keys: Any, tables: Any, causal: bool) -> Any:
    return _attention(q, k, v, keys, tables, causal), (q, k, v, keys, tables)


def _backward(causal: bool, kept: tuple[Any, ...], do: jax.Array) -> Any:
    q, k, v, keys, tables = kept
    found = _sharded(_Call(BACKWARD, 3, 5), (q, k, v, do), keys, tables, causal)
    return *found, None, None


_attention.defvjp(_forward, _backward)


# ---- calls


class _Call(NamedTuple):
    """One of the kernels: its name, arrays that it gives, matrix products."""

    name: str
    outputs: int
    products: int


def _sharded(
    call: _Call,
    arrays: tuple[jax.Array, ...],
    keys: jax.Array | None,
    tables: jax.Array | None,
    causal: bool,
) -> list[jax.Array]:
    """Each device's rows and heads by themselves: the partitioner cannot look into a kernel.

    Elsewhere than on a TPU, Pallas interprets the kernels: slow, and good for tests.
    """
    heads = ("batch", None, "heads", None)
    rows = {"keys": (keys, ("batch", None)), "tables": (tables, ("batch", None, None))}
    rows = {name: pair for name, pair in rows.items() if pair[0] is not None}
    found = map_shards(
        functools.partial(
            _run, call, extras=tuple(rows), causal=causal, interpret=platform() != "tpu"
        ),
        *((x, heads) for x in arrays),
        *rows.values(),
        out=[heads] * call.outputs,
    )
    return list(found)


def _run(
    call: _Call, *arrays: jax.Array, extras: tuple[str, ...], causal: bool, interpret: bool
) -> tuple[jax.Array, ...]:
    """Runs a kernel on one device's arrays, each [B, T, N, H], then what `extras` names."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rest = dict(zip(extras, arrays[len(arrays) - len(extras) :]))
    arrays = arrays[: len(arrays) - len(extras)]
    B, T, N, H = arrays[0].shape
    dtype = arrays[0].dtype
    rows, lanes = fill(T)
    moved = len(arrays) + call.outputs
    size, shared = 2 * moved * rows * H * dtype.itemsize, 2 * ("tables" in rest) * rows * H * 4
    b = 16 if 16 * (size + shared) <= _BUDGET else 8
    n = max(n for n in (1, 2, 4) if n == 1 or (N % n == 0 and b * (n * size + shared) <= _BUDGET))
    block = pl.BlockSpec((rows, n, b, H), lambda i, j: (0, j, i, 0))
    inputs, specs = [jnp.transpose(x, (1, 2, 0, 3)) for x in arrays], [block] * len(arrays)
    if "keys" in rest:
        filled = jnp.pad(rest["keys"].astype(jnp.float32), ((0, 0), (0, lanes - T)))
        inputs.append(filled[:, None])
        specs.append(pl.BlockSpec((b, 1, lanes), lambda i, j: (i, 0, 0)))
    if "tables" in rest:
        inputs.append(rest["tables"])
        specs.append(pl.BlockSpec((b, rows, H), lambda i, j: (i, 0, 0)))
    out = pl.pallas_call(
        functools.partial(
            _forward_kernel if call.name == FORWARD else _backward_kernel,
            extras=extras,
            tokens=T,
            causal=causal,
            interpret=interpret,
        ),
        grid=(pl.cdiv(B, b), N // n),
        in_specs=specs,
        out_specs=[block] * call.outputs,
        out_shape=[jax.ShapeDtypeStruct((T, N, B, H), dtype)] * call.outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            # As executed, which `plan` counts; a matrix unit's own padding aside.
            flops=2 * call.products * B * N * rows * lanes * H,
            transcendentals=B * N * rows * lanes,
            bytes_accessed=moved * B * T * N * H * dtype.itemsize,
        ),
        name=call.name,
        interpret=interpret,
    )(*inputs)
    return tuple(jnp.transpose(x, (2, 0, 1, 3)) for x in out)


# ---- kernels


def _forward_kernel(
    *refs: Any, extras: tuple[str, ...], tokens: int, causal: bool, interpret: bool
) -> None:
    rest = dict(zip(extras, refs[3:]))
    q_ref, k_ref, v_ref, o_ref = *refs[:3], refs[-1]
    lanes = fill(tokens)[1]
    # In steps of so many rows, a v6e's compiler packs the work densest: with few, steps wait for
    # each other; with many, values leave the registers.
    for some in _groups(q_ref, 16 if lanes == _LANES else 4, interpret):
        bias = [_bias(rest.get("keys"), r, tokens, causal, transposed=False) for r in some.index]
        turns = [_turn(rest.get("tables"), r, tokens) for r in some.index]
        dtype, scale = q_ref.dtype, q_ref.shape[-1] ** -0.5
        for head in some.heads:
            load = functools.partial(some.load, head=head, tokens=tokens)
            q, k = (_rotated(load(ref), turns, dtype) for ref in (q_ref, k_ref))
            v = [x.astype(dtype) for x in load(v_ref)]
            k, v = (_longer(x, lanes) for x in (k, v))
            logits = [x * scale + b for x, b in zip(_products(q, k, 1, 1), bias)]  # [rows, lanes]
            weights = [_softmax(x, axis=1).astype(dtype) for x in logits]
            some.store(o_ref, _products(weights, v, 1, 0), head)


def _backward_kernel(
    *refs: Any, extras: tuple[str, ...], tokens: int, causal: bool, interpret: bool
) -> None:
    """Logits stand transposed, keys by queries: one product of five then transposes, not two."""
    rest = dict(zip(extras, refs[4:]))
    q_ref, k_ref, v_ref, do_ref, dq_ref, dk_ref, dv_ref = *refs[:4], *refs[-3:]
    rows, lanes = fill(tokens)
    for some in _groups(q_ref, 8 if lanes == _LANES else 2, interpret):
        bias = [_bias(rest.get("keys"), r, tokens, causal, transposed=True) for r in some.index]
        turns = [_turn(rest.get("tables"), r, tokens) for r in some.index]
        dtype, scale = q_ref.dtype, q_ref.shape[-1] ** -0.5
        for head in some.heads:
            load = functools.partial(some.load, head=head, tokens=tokens)
            q, k = (_rotated(load(ref), turns, dtype) for ref in (q_ref, k_ref))
            v, do = ([x.astype(dtype) for x in load(ref)] for ref in (v_ref, do_ref))
            q, do = (_longer(x, lanes) for x in (q, do))
            logits, dweights = _products(k, q, 1, 1), _products(v, do, 1, 1)  # [rows, lanes]
            weights = [_softmax(x * scale + b, axis=0) for x, b in zip(logits, bias)]
            some.store(dv_ref, _products([x.astype(dtype) for x in weights], do, 1, 0), head)
            dlogits = [_softmax_gradient(*x) for x in zip(weights, dweights)]
            if "keys" in rest:  # a query without any key has weights where there is no gradient
                dlogits = [jnp.where(b == 0, x, 0) for x, b in zip(dlogits, bias)]
            dlogits = [(x * scale).astype(dtype) for x in dlogits]
            dk = _rotated(_products(dlogits, q, 1, 0), turns, jnp.float32, back=True)
            some.store(dk_ref, dk, head)
            dq = [x[:rows] for x in _products(dlogits, k, 0, 0)]
            some.store(dq_ref, _rotated(dq, turns, jnp.float32, back=True), head)


def _products(xs: Sequence[Any], ys: Sequence[Any], over_x: int, over_y: int) -> list[jax.Array]:
    dims = (((over_x,), (over_y,)), ((), ()))
    return [lax.dot_general(*x, dims, preferred_element_type=jnp.float32) for x in zip(xs, ys)]


def _softmax(logits: jax.Array, axis: int) -> jax.Array:
    powers = jnp.exp(logits - jnp.max(logits, axis, keepdims=True))
    return powers * (1 / jnp.sum(powers, axis, keepdims=True))


def _softmax_gradient(weights: jax.Array, dweights: jax.Array) -> jax.Array:
    return weights * (dweights - jnp.sum(weights * dweights, 0, keepdims=True))


def _bias(keys: Any, row: int, tokens: int, causal: bool, *, transposed: bool) -> jax.Array:
    """What is added to logits [queries, keys], or [keys, queries] where `transposed`.

    The least number where a key is masked, as `attend` has it: adding a logit does not change it,
    and a query without any key attends uniformly. -inf where there is no key at all.

    Args:
        keys: block [rows, 1, lanes], 0 on padding; None for no padding.
        row: which one.
    """
    shape = fill(tokens)
    axes = (0, 1) if transposed else (1, 0)
    key, query = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in axes)
    masked = key > query if causal else None
    if keys is not None:
        real = jnp.broadcast_to(keys[row], (shape[1],) * 2 if transposed else shape)
        gone = (real.T[: shape[0]] if transposed else real) == 0
        masked = gone if masked is None else masked | gone
    least = jnp.finfo(jnp.float32).min
    bias = jnp.float32(0) if masked is None else jnp.where(masked, least, 0.0)
    return jnp.where(key < tokens, bias, -jnp.inf)


# ---- RoPE


def _turn(tables: Any, row: int, tokens: int) -> Tables | None:
    """Factors of [T, H] and of [T, H] with its halves exchanged, of a block [rows, T, H]."""
    if tables is None:
        return None
    table = _cleared(tables[row], tokens)  # cosines, then sines
    exchanged = _exchanged(table)
    first = lax.broadcasted_iota(jnp.int32, table.shape, 1) < table.shape[1] // 2
    return jnp.where(first, table, exchanged), jnp.where(first, -exchanged, table)


def _rotated(
    xs: Sequence[jax.Array], turns: Sequence[Tables | None], dtype: Any, back: bool = False
) -> list[jax.Array]:
    """Float32 [T, H] of each row, rotated (or back) where there are tables, in `dtype`."""
    sign = -1 if back else 1
    done = (
        x if turn is None else x * turn[0] + sign * (_exchanged(x) * turn[1])
        for x, turn in zip(xs, turns)
    )
    return [x.astype(dtype) for x in done]


def _exchanged(x: jax.Array) -> jax.Array:
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.roll(x, x.shape[1] // 2, 1)


# ---- rows of a block


class _Rows(NamedTuple):
    """Some rows of a block, worked on together: their dependent steps overlap.

    Attributes:
        index: in the block, consecutive and even in number.
        heads: of the block.
        packed: taken out as words of two rows; else by index, as the interpreter can.
    """

    index: range
    heads: range
    packed: bool

    def load(self, ref: Any, head: int, tokens: int) -> list[jax.Array]:
        """Float32 [T, H] of each row, T filled up; zero behind the last token."""
        if not self.packed:
            return [_cleared(ref[:, head, i], tokens).astype(jnp.float32) for i in self.index]
        found = []
        for view, cut in self._words(ref, head):
            found += halves(_cleared(view[cut], tokens))
        return found

    def store(self, ref: Any, xs: Sequence[jax.Array], head: int) -> None:
        """Writes float32 [T, H] of each row."""
        if not self.packed:
            for i, x in zip(self.index, xs, strict=True):
                ref[:, head, i] = x.astype(ref.dtype)
            return
        for (view, cut), low, high in zip(self._words(ref, head), xs[::2], xs[1::2], strict=True):
            view[cut] = joined(low, high)

    def _words(self, ref: Any, head: int) -> Iterator[tuple[Any, Any]]:
        """The block as words [T * heads * words, H], and where in it each pair of rows is."""
        from jax.experimental import pallas as pl

        T, heads, rows, H = ref.shape
        words = rows // 2
        view = ref.bitcast(jnp.uint32).reshape(T * heads * words, H)
        for word in range(self.index.start // 2, self.index.stop // 2):
            yield view, pl.ds(head * words + word, T, heads * words)


def _groups(ref: Any, size: int, interpret: bool) -> Iterator[_Rows]:
    """All rows of a block, so many at a time."""
    size = min(size, ref.shape[2])
    packed = ref.dtype == jnp.bfloat16 and not interpret
    for start in range(0, ref.shape[2], size):
        yield _Rows(range(start, start + size), range(ref.shape[1]), packed)


def halves(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two bfloat16 of each 32-bit word as float32, first that of the low half."""
    bits = words << 16, words & jnp.uint32(0xFFFF0000)
    low, high = (lax.bitcast_convert_type(b, jnp.float32) for b in bits)
    return low, high


def joined(low: jax.Array, high: jax.Array) -> jax.Array:
    """Two float32 arrays, rounded to bfloat16, as 32-bit words."""
    rounded = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (low, high))
    below, above = (lax.bitcast_convert_type(x, jnp.uint32) for x in rounded)
    return (below >> 16) | above


def _cleared(x: jax.Array, tokens: int) -> jax.Array:
    """[T, H] with zeros behind the last token."""
    if len(x) == tokens:
        return x
    last = len(x) - _TILE  # the last tile alone can hold anything but tokens
    end = x[last:]
    there = last + lax.broadcasted_iota(jnp.int32, end.shape, 0) < tokens
    end = jnp.where(there, end, jnp.zeros_like(end))
    return jnp.concatenate([x[:last], end]) if last else end


def _longer(xs: Sequence[jax.Array], length: int) -> list[jax.Array]:
    """Zeros behind the rows of each [T, H]."""
    rows, H = xs[0].shape
    if rows == length:
        return list(xs)
    return [jnp.concatenate([x, jnp.zeros((length - rows, H), x.dtype)]) for x in xs]
