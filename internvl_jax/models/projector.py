"""Projectors: from vision tokens to the language model's width."""

from __future__ import annotations

import jax
from flax import nnx

from internvl_jax.nn.mlp import Mlp
from internvl_jax.nn.norm import LayerNorm


def pixel_unshuffle(tokens: jax.Array, factor: int = 2, version: str = "v2") -> jax.Array:
    """Folds each factor x factor square of patches into one wider token.

    ``v2`` emits the new tokens row-major; ``v1`` is the same array transposed, a bug that
    checkpoints before InternVL 1.5 were trained with.

    Args:
        tokens: [B, R*C, D] patch tokens without CLS, a square grid, row-major.
        factor: s; the token count shrinks by s*s.
        version: ``v1`` or ``v2``.

    Returns:
        [B, R*C / s^2, D * s^2].
    """
    B, P, D = tokens.shape
    side = round(P**0.5)
    if side * side != P or side % factor:
        raise ValueError(
            f"{P} patch tokens are not a square grid that {factor}x{factor} squares tile."
        )
    if version not in ("v1", "v2"):
        raise ValueError(f"Unknown pixel-unshuffle version {version!r}: use 'v1' or 'v2'.")
    n = side // factor
    x = tokens.reshape(B, n, factor, n, factor, D)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return x.transpose(order).reshape(B, n * n, factor * factor * D)


class Mlp2xGelu(Mlp):
    """``mlp2x_gelu``: linear, GELU, linear, with biases (LLaVA-1.5)."""

    def __init__(self, width: int, out: int, *, rngs: nnx.Rngs):
        super().__init__(width, out, out, rngs=rngs)


class Mlp1(nnx.Module):
    """``mlp1``: pixel unshuffle, LayerNorm, linear, GELU, linear (InternVL 1.2 and later)."""

    def __init__(
        self, width: int, out: int, *, version: str = "v2", factor: int = 2, rngs: nnx.Rngs
    ):
        wide = width * factor**2
        self.version, self.factor = version, factor
        self.norm = LayerNorm(wide, eps=1e-5, rngs=rngs)
        self.mlp = Mlp(wide, out, out, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, P, D] patch tokens without CLS -> [B, P / s^2, out]."""
        return self.mlp(self.norm(pixel_unshuffle(tokens, self.factor, self.version)))


def projector_param_count(kind: str, width: int, out: int, query_width: int = 0) -> int:
    """Parameters of a projector by its name."""

    def two_layers(d: int) -> int:
        return d * out + out + out * out + out

    if kind == "mlp2x_gelu":
        return two_layers(width)
    if kind == "two_mlp":
        return two_layers(width) + two_layers(query_width)
    if kind == "mlp1":
        return 2 * 4 * width + two_layers(4 * width)
    raise ValueError(f"Unknown projector {kind!r}: use mlp2x_gelu, two_mlp or mlp1.")
