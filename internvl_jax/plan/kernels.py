"""FLOPs of Pallas kernels, which a compiled program does not show."""

from __future__ import annotations

import math
import re

from internvl_jax.plan.hlo import Op

_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def kernel_flops(name: str, op: Op) -> float:
    """Matrix FLOPs of one call of a kernel, as they are executed: tokens filled up, logits again.

    A kernel may state its own (Pallas writes its cost estimate into the call): those of
    `nn.short_attention` do. Splash attention does not; its operands and results tell.

    Args:
        name: of the kernel.
        op: the operation that calls it.

    Returns:
        FLOPs; 0 for a kernel that is neither.
    """
    stated = re.search(r'"cost_estimate":\{[^}]*"flops":"(\d+)"', op.attributes)
    if stated:
        return float(stated[1])
    splash = re.match(r"splash_m[hq]a_(fwd|dq|dkv)_", name)
    return _splash(splash[1], op) if splash else 0.0


def _splash(kind: str, op: Op) -> float:
    operands = [
        (dtype, tuple(int(n) for n in dims.split(",")))
        for dtype, dims in re.findall(
            r"(\w+)\[([\d,]+)\]", op.attribute("operand_layout_constraints") or ""
        )
    ]
    # A batch of one has no axis of its own.
    *batch, N, T, H = next(dims for dtype, dims in operands if dtype != "s8")
    products = _PRODUCTS[kind]
    # One kernel for all gradients gives dq per block of keys, an axis more than dk and dv have.
    products += kind == "dkv" and any(len(shape.dims) == len(batch) + 4 for shape in op.shapes)
    # Which blocks a causal kernel skips is told by an array, int8 [1, blocks, blocks]; a kernel
    # that skips none has no such array.
    blocks = max((max(dims) for dtype, dims in operands if dtype == "s8"), default=0)
    share = (blocks + 1) / (2 * blocks) if blocks else 1.0
    return 2.0 * products * math.prod(batch) * N * T * T * H * share
