"""How much longer than the roofline the compiler itself expects a program to take.

The compiler's ``optimal_seconds`` counts a loop's body once, knows nothing of kernels or of the
interconnect, and on attention it can be negative (docs/planning.md). It is believable for a plain
program: the feed-forward half of an InternViT-6B block, forwards and backwards on one chip. Its
ratio to the roofline of the same program is bound B's factor for that kind of chip.
"""

from __future__ import annotations

import dataclasses
from multiprocessing.connection import Connection

from internvl_jax.chips import Topology
from internvl_jax.plan.compile import PlanError, devices, start
from internvl_jax.plan.hlo import parse
from internvl_jax.plan.report import rates
from internvl_jax.plan.roofline import roofline

ROWS, TOKENS, WIDTH = 64, 257, 3200


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Seconds of one program by two estimates, and their ratio."""

    chip: str
    compiler_s: float
    roofline_s: float

    @property
    def factor(self) -> float:
        return self.compiler_s / self.roofline_s

    def __str__(self) -> str:
        return (
            f"{self.chip}: the compiler expects {self.compiler_s * 1e3:.2f} ms, the roofline is "
            f"{self.roofline_s * 1e3:.2f} ms: calibration {self.factor:.3f}"
        )


def calibrate(topology: Topology) -> Calibration:
    """Compiles the program for one chip of a topology and compares the two estimates.

    Raises:
        PlanError: the compiler failed, or gave no positive estimate (it does so on some programs).
    """
    worker, receive = start(_measure, topology)
    try:
        answer = receive.recv()
    except EOFError:
        raise PlanError("The compiler's process ended without an answer.") from None
    finally:
        worker.join()
    if isinstance(answer, Exception):
        raise answer
    compiler, text = answer
    if compiler <= 0:
        raise PlanError(f"The compiler's estimate is {compiler} s: no calibration for this chip.")
    return Calibration(
        topology.chip.name, compiler, roofline(parse(text), rates(topology)).roofline_s
    )


def _measure(topology: Topology, send: Connection) -> None:
    import tempfile
    from pathlib import Path

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from internvl_jax.nn.mlp import Mlp
    from internvl_jax.nn.norm import RMSNorm

    class Half(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = RMSNorm(WIDTH, eps=1e-6, rngs=rngs)
            self.mlp = Mlp(WIDTH, 4 * WIDTH, rngs=rngs)

    try:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Half(nnx.Rngs(0))))

        def loss(state, x):
            half = nnx.merge(graphdef, state)
            return jnp.sum((x + half.mlp(half.norm(x))).astype(jnp.float32) ** 2)

        whole = NamedSharding(Mesh(np.array(devices(topology)[:1]), ("chip",)), PartitionSpec())
        shape = lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=whole)
        states = jax.tree.map(lambda p: shape(p.shape), state)
        inputs = shape((ROWS, TOKENS, WIDTH))
        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        with tempfile.TemporaryDirectory() as folder:
            compiled = step.lower(states, inputs).compile(
                {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            )
            (text,) = (
                path.read_text(encoding="utf-8")
                for path in Path(folder).glob("*jit_loss*.after_optimizations.txt")
                if ".extracted." not in path.name
            )
        cost = compiled.cost_analysis()
        send.send((float(cost["optimal_seconds"]), text))
    except Exception as error:
        send.send(PlanError(f"{type(error).__name__}: {error}"))
