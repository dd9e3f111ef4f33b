"""Compiles small programs for a TPU that is not there, and leaves the compiler's texts.

Run as a script in a process of its own: `programs.py TOPOLOGY DIRECTORY` writes, per program, a
directory with the dump, and `cost.json` with the compiler's own analysis, which counts the body of
every loop once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

B, D, L = 512, 1024, 7  # rows, width, layers
ATTENTION = dict(B=4, T=128, S=256, N=8, H=128)
PATCH = dict(B=8, size=56, patch=14, width=256)


def programs():
    """Name -> (function, arguments, sharding axes of each argument)."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import PartitionSpec as P

    bf16, f32 = jnp.bfloat16, jnp.float32
    row, weight, stack = ((B, D), bf16), ((D, D), bf16), ((L, D, D), bf16)
    step = lambda x, w: (jnp.tanh(x @ w), None)
    square = lambda x: jnp.sum(x.astype(f32) ** 2)

    def nested(x, w):
        inner = lambda x, _: (lax.scan(step, x, w)[0] * 2, None)
        return lax.scan(inner, x, None, length=3)[0]

    def from_two(x, w):
        return lax.fori_loop(2, 9, lambda i, x: jnp.tanh(x @ w) + i.astype(bf16), x)

    def attention(q, k):
        return square(jnp.einsum("BTNH,BSNH->BNTS", q, k))

    def branches(x, w):
        work = lambda x: lax.scan(step, x, w)[0]
        body = lambda x, _: (lax.cond(x[0, 0] > 0, work, lambda x: x + 1, x), None)
        return lax.scan(body, x, None, length=3)[0]

    def remat(w, x):
        return square(lax.scan(jax.checkpoint(step), x, w)[0])

    def data_bound(x, w):
        return lax.while_loop(lambda x: square(x) < 1e3, lambda x: x @ w, x)

    def patches(image, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        p = PATCH["patch"]
        return lax.conv_general_dilated(image, kernel, (p, p), "VALID", dimension_numbers=dims)

    def collectives(x):
        def body(x, _):
            rows = lax.all_gather(x, "x", tiled=True)  # [4b, D]
            total = lax.psum(jnp.tanh(rows), "x")
            part = lax.psum_scatter(jnp.sin(total), "x", tiled=True)  # [b, D]
            return lax.ppermute(part, "x", [(i, (i + 1) % 4) for i in range(4)]), None

        return lax.scan(body, x, None, length=5)[0]

    def exchange(x):
        return lax.all_to_all(x, "x", 1, 0, tiled=True)

    a, p = ATTENTION, PATCH
    heads = lambda rows: ((a["B"], rows, a["N"], a["H"]), bf16)
    shards = lambda f: jax.shard_map(f, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    return {
        "matmul": (lambda x, w: x @ w, (row, weight), ((), ())),
        "scan": (lambda x, w: lax.scan(step, x, w)[0], (row, stack), ((), ())),
        "map": (lambda x, w: lax.map(lambda w: x @ w, w), (row, stack), ((), ())),
        "nested": (nested, (row, stack), ((), ())),
        "from_two": (from_two, (row, weight), ((), ())),
        "branches": (branches, (row, stack), ((), ())),
        "remat": (jax.grad(remat, argnums=(0, 1)), (stack, row), ((), ())),
        "data_bound": (data_bound, (row, weight), ((), ())),
        "attention": (attention, (heads(a["T"]), heads(a["S"])), ((), ())),
        "attention_grad": (
            jax.grad(attention, argnums=(0, 1)),
            (heads(a["T"]), heads(a["S"])),
            ((), ()),
        ),
        "patches": (
            patches,
            (
                ((p["B"], p["size"], p["size"], 3), bf16),
                ((p["patch"], p["patch"], 3, p["width"]), bf16),
            ),
            ((), ()),
        ),
        "elementwise": (lambda x: jnp.tanh(x) + 1, (((4096, 4096), bf16),), ((),)),
        "keep": (lambda x: lax.scan(lambda c, x: (c + x, c * x), x[0], x), (stack,), ((),)),
        "take": (lambda x, i: x[i], (((500_000, 512), f32), ((64,), jnp.int32)), ((), ())),
        "fsdp": (jax.grad(remat, argnums=(0, 1)), (stack, row), ((None, "x"), ("x",))),
        "collectives": (shards(collectives), (((4 * B, D), f32),), (("x",),)),
        "exchange": (shards(exchange), (((4 * B, D), f32),), (("x",),)),
    }


def main(topology: str, directory: Path) -> None:
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    devices = np.array(topologies.get_topology_desc(topology, "tpu").devices).reshape(-1)
    for name, (function, arguments, axes) in programs().items():
        sharded = any(axes)
        mesh = Mesh(devices if sharded else devices[:1], ("x",), axis_types=(AxisType.Auto,))
        abstract = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
            for (shape, dtype), spec in zip(arguments, axes)
        ]
        out = directory / name
        out.mkdir(parents=True)
        options = {"xla_dump_to": str(out), "xla_dump_hlo_as_text": True}
        with jax.set_mesh(mesh):
            compiled = jax.jit(function).lower(*abstract).compile(compiler_options=options)
        (out / "cost.json").write_text(json.dumps(compiled.cost_analysis()))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(sys.argv[1], Path(sys.argv[2]))
