"""Scaled dot-product attention: one function, four implementations.

======  ==============================================  ============================================
name    how                                             where ``auto`` takes it
======  ==============================================  ============================================
einsum  two products; the logits [T, S] rest in memory  everywhere else
short   our Pallas kernels for TPU, both passes:        TPU, bfloat16, up to `SHORT` tokens, H 128,
        `nn.short_attention`                            as many heads of k and v as of q
splash  Pallas kernels for TPU, both passes             TPU, bfloat16, `LONG` tokens or more, H a
                                                        multiple of 128
cudnn   cuDNN's flash attention, both passes            GPU, bfloat16, H a multiple of 8 up to 128
======  ==============================================  ============================================

The kernels keep the logits on the chip. They need a mask that is a rule (`Mask`), and queries and
keys of the same row; other masks, caches and cross-attention always take `einsum`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from internvl_jax.nn.rope import apply_rope
from internvl_jax.nn.short_attention import short_attention
from internvl_jax.sharding.mesh import platform
from internvl_jax.sharding.rules import map_shards

IMPLEMENTATIONS = ("auto", "einsum", "short", "splash", "cudnn")

SHORT = 300
"""Up to so many tokens, a row's logits fit on a TPU core beside its q, k and v (`short`). Up to so
many keys, `einsum` leaves the logits of bfloat16 queries in bfloat16: their way to memory and back
is most of its time. It adds an error of the size that rounding q, k and v brings (tests:
at most twice it)."""

LONG = 512
"""From so many keys on, `splash` saves more than its padding and transposing costs."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=["causal"])
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query may attend to, as a rule that a kernel can follow.

    Queries on padding are nobody's business: what they attend to depends on the implementation. It
    is finite, and where it goes unused it has no gradient.

    Attributes:
        keys: bool [B, S], False on padding; or, where a row holds several texts (`short` cannot),
            int32 [B, S], the text that each token belongs to, 0 on padding: none sees another's.
            None for no padding.
        causal: keys after the query's own position are masked as well.
    """

    keys: jax.Array | None = None
    causal: bool = False

    def dense(self, queries: int, keys: int) -> jax.Array | None:
        """The mask as an array, bool [B|1, T, S]; None where nothing is masked."""
        allowed = None
        if self.keys is not None:
            allowed = self.keys[:, None, :]
            if self.packed:
                allowed = self.keys[:, :, None] == allowed
        if not self.causal:
            return allowed
        if queries != keys:
            raise ValueError(
                f"A causal mask of {queries} queries and {keys} keys does not say where the "
                "queries stand: pass an array."
            )
        square = jnp.tril(jnp.ones((1, queries, keys), bool))
        return square if allowed is None else square & allowed

    @property
    def packed(self) -> bool:
        """Whether a row may hold several texts."""
        return self.keys is not None and self.keys.dtype != jnp.bool_


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask | jax.Array = Mask(),
    implementation: str = "einsum",
    rope: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax; remat policies know it as ``attn``.

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H] with N a multiple of K (grouped queries).
        v: [B, S, K, H].
        mask: a rule, or bool, broadcastable to [B, T, S], True where attention is allowed. A row of
            an array with nothing allowed attends uniformly, as the original does.
        implementation: one of `IMPLEMENTATIONS`.
        rope: tables (`nn.rope`) that q and k are rotated by first; where that happens in a kernel
            (`rotates`), the rotated ones never exist in memory.

    Returns:
        [B, T, N, H] in q's dtype.
    """
    chosen = _chosen(q, k, mask, implementation)
    if rope is not None and chosen != "short":
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    if isinstance(mask, Mask):
        if chosen == "splash":
            return _splash(q, k, v, mask)  # names what it keeps itself
        if chosen == "short":
            y = short_attention(q, k, v, mask.keys, causal=mask.causal, rope=rope)
            return checkpoint_name(y, "attn")
        if chosen == "cudnn":
            return checkpoint_name(_cudnn(q, k, v, mask), "attn")
    allowed = mask.dense(q.shape[1], k.shape[1]) if isinstance(mask, Mask) else mask
    return checkpoint_name(_einsum(q, k, v, allowed), "attn")


def rotates(q: jax.Array, k: jax.Array, mask: Mask | jax.Array, implementation: str) -> bool:
    """Whether `attend` would rotate q and k in its kernel."""
    return _chosen(q, k, mask, implementation) == "short"


def _chosen(q: jax.Array, k: jax.Array, mask: Mask | jax.Array, implementation: str) -> str:
    """The implementation that can and shall do it: by platform and size where it is ``auto``."""
    if not isinstance(mask, Mask) or q.shape[1] != k.shape[1]:
        return "einsum"
    T, H = q.shape[1], q.shape[3]
    short = q.shape == k.shape and T <= SHORT and H == 128 and not mask.packed
    if implementation != "auto":
        return "einsum" if implementation == "short" and not short else implementation
    where = platform() if q.dtype == jnp.bfloat16 else None
    if where == "tpu" and short:
        return "short"
    if where == "tpu" and T >= LONG and H % 128 == 0:
        return "splash"
    if where == "gpu" and H % 8 == 0 and H <= 128:
        return "cudnn"
    return "einsum"


def _einsum(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    rest = q.dtype if q.dtype == jnp.bfloat16 and S <= SHORT else jnp.float32
    q = q.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=rest)
    logits = logits.astype(jnp.float32) * H**-0.5
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(B, T, N, H)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """Each device's rows and heads by themselves: the partitioner cannot look into a kernel.

    Elsewhere than on a TPU, Pallas interprets the kernels: slow, and good for tests.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    rows, keys = ("batch", None, "kv_heads", None, None), ("batch", None, "kv_heads", None)
    out = map_shards(
        functools.partial(_splash_shard, causal=mask.causal, interpret=platform() != "tpu"),
        (q.reshape(B, T, K, N // K, H), rows),
        (k, keys),
        (v, keys),
        *([] if mask.keys is None else [(mask.keys, ("batch", None))]),
        out=rows,
    )
    return out.reshape(B, T, N, H)


def _splash_shard(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array | None = None,
    *,
    causal: bool,
    interpret: bool,
) -> jax.Array:
    """q [B, T, K, G, H], k and v [B, T, K, H], keys [B, T] -> [B, T, K, G, H]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, T, K, G, H = q.shape
    block, padded = _blocks(T)
    fill = lambda x: jnp.pad(x, [(0, 0), (0, padded - T)] + [(0, 0)] * (x.ndim - 2))
    # Scaled in float32: 128^-0.5 is no bfloat16 number.
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)
    q = jnp.einsum("BTKGH->BKGTH", fill(q)).reshape(B, K * G, padded, H)
    k, v = (jnp.einsum("BTKH->BKTH", fill(x)) for x in (k, v))

    # Tokens and padding are two segments, neither sees the other: thus no query is without a key.
    # A causal row that is only filled up needs none, for its tokens never look ahead.
    if keys is None and not causal and padded > T:
        keys = jnp.ones((B, T), bool)
    segments = None if keys is None else splash.SegmentIds(*[fill(keys.astype(jnp.int32))] * 2)

    rule = (splash.CausalMask if causal else splash.FullMask)((padded, padded))
    # One kernel finds all gradients where keys are one block; else it would leave one dq per block.
    one = block == padded
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if one else block,
        block_kv_dq=None if one else block,
        use_fused_bwd_kernel=one,
    )
    kernel: Any = splash.make_splash_mha(
        splash.MultiHeadMask([rule] * (K * G)),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attn",
        interpret=interpret,
    )
    y = jax.vmap(kernel)(q, k, v, segments)[:, :, :T]
    return jnp.einsum("BKGTH->BTKGH", y.reshape(B, K, G, T, H))


def _blocks(length: int) -> tuple[int, int]:
    """Side of the kernel's square blocks, and the length filled up to whole ones.

    Least filling first, then the largest block: 577 -> 640 in one, 1,025 -> 3 x 384, 2,048 ->
    4 x 512. A float32 block of logits of 640 x 640 is 1.6 MB of a core's 16 MB.
    """
    fit = lambda block: -(-length // block) * block
    block = min(range(128, 641, 128), key=lambda b: (fit(b), -b))
    return block, fit(block)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    allowed = dataclasses.replace(mask, causal=False).dense(q.shape[1], k.shape[1])
    allowed = None if allowed is None else allowed[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=allowed, is_causal=mask.causal, implementation="cudnn"
    )
