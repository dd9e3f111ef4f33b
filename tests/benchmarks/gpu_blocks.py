"""InternViT-6B's blocks and QLLaMA's layers on one NVIDIA GPU, against compiled PyTorch.

    python -m tests.benchmarks.gpu_blocks [--json FILE] [--torch_python PATH]
    python -m tests.benchmarks.gpu_blocks --tiny     # any machine: does it run?

True widths, as many layers as fit; float32 parameters, bfloat16 products, AdamW. PyTorch has the
same layers with its own attention under autocast and torch.compile. Every turn is a process of its
own with the whole card, and the sides take turns. MFU is of the card's measured matrix rate: the
best that either side reaches on large square products. QLLaMA is stage 1's text encoder, without
queries.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "RESULT "
SIDES = ("ours", "torch")
STACKS = ("vit", "qllama")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one measurement.

    Attributes:
        stack: one of `STACKS`.
        layers, batch, tokens: depth, rows, row length.
        count: steps per reading.
        matrix: side of the square products that find the card's rate.
    """

    stack: str
    layers: int
    batch: int
    tokens: int
    width: int
    heads: int
    mlp: int
    count: int = 10
    matrix: int = 8192
    device: str = "cuda"
    compiled: bool = True

    def config(self) -> Any:
        """The layers as a model config of ours."""
        from internvl_jax.models.intern_vit import VitConfig
        from internvl_jax.models.llama import LlamaConfig

        sizes: dict[str, Any] = dict(
            width=self.width, depth=self.layers, heads=self.heads, mlp_dim=self.mlp
        )
        if self.stack == "vit":
            return VitConfig(**sizes)
        return LlamaConfig(vocab_size=8, head=False, cross_frequency=1, **sizes)

    def forward_flops(self) -> int:
        """Of all layers on the whole batch."""
        config = self.config()
        none = dataclasses.replace(config, depth=0)
        return self.batch * (config.flops(self.tokens) - none.flops(self.tokens))


FULL = {
    "vit": Case("vit", 0, batch=32, tokens=257, width=3200, heads=25, mlp=12800),
    "qllama": Case("qllama", 0, batch=64, tokens=80, width=4096, heads=32, mlp=11008),
}
TINY = {
    name: dataclasses.replace(
        case,
        **dict(layers=2, batch=2, tokens=8, width=64, heads=4, mlp=128, count=1, matrix=64),
        **dict(device="cpu", compiled=False),
    )
    for name, case in FULL.items()
}


def fitting(case: Case, memory: float) -> Case:
    """The case with as many layers as a card of so many bytes surely holds.

    16 bytes per parameter (value, gradient, two moments), two more for its bfloat16 copy; per token
    what backpropagation keeps without rematerialisation, attention's weights in both precisions.
    """
    two, one = (dataclasses.replace(case, layers=n).config() for n in (2, 1))
    parameters = two.param_count() - one.param_count()
    kept = case.batch * case.tokens * (24 * case.width + 8 * case.mlp) * 2
    kept += case.batch * case.heads * case.tokens**2 * 6
    return dataclasses.replace(case, layers=max(int(0.75 * memory / (18 * parameters + kept)), 1))


def timed(
    call: Callable[[], Any], wait: Callable[[], None], count: int, readings: int = 5
) -> float:
    """Seconds per call, the median of some readings after a warm-up."""
    for _ in range(3):
        call()
    wait()
    found = []
    for _ in range(readings):
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        found.append((time.perf_counter() - start) / count)
    return statistics.median(found)


def run_ours(case: Case) -> dict[str, float]:
    """Matrix rate, forward and training step of our modules."""
    import jax
    import jax.numpy as jnp

    from internvl_jax.models.definition import Definition
    from internvl_jax.train.optimizer import OptimConfig, make_optimizer

    if case.device == "cuda" and jax.default_backend() != "gpu":
        raise SystemExit("JAX sees no GPU: install jax[cuda12], or ask for --tiny.")
    jax.config.update("jax_default_matmul_precision", "default")
    a = jnp.ones((case.matrix, case.matrix), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    last: list[Any] = [None]

    def keep(value: Any) -> None:
        last[0] = value

    wait = lambda: jax.block_until_ready(last[0])
    rate = 2 * case.matrix**3 / timed(lambda: keep(product(a, a)), wait, case.count)

    build, apply = ours(case)
    definition = Definition.of(build, lambda path: True)
    params = jax.jit(definition.fresh, static_argnums=0)(0)
    shape = (case.batch, case.tokens, case.width)
    x = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(apply(definition.merge(params), x).astype(jnp.float32)))

    forward = jax.jit(loss)
    out = {"rate": rate, "forward": timed(lambda: keep(forward(params, x)), wait, case.count)}

    config = OptimConfig(schedule="constant", peak_lr=1e-5)
    tx = make_optimizer(config, 1, params, lambda path, shape: 1.0)
    state = [params, jax.jit(tx.init)(params)]
    del params

    def update(params: Any, opt: Any, x: jax.Array) -> tuple[Any, Any, jax.Array]:
        import optax

        value, grads = jax.value_and_grad(loss)(params, x)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    step = jax.jit(update, donate_argnums=(0, 1))

    def train() -> None:
        state[0], state[1], value = step(state[0], state[1], x)
        keep(value)

    return {**out, "train": timed(train, wait, case.count)}


def ours(
    case: Case, dtype: str = "bfloat16"
) -> tuple[Callable[..., Any], Callable[[Any, Any], Any]]:
    """How to build our layers, and how to apply them to [B, T, D]."""
    import functools

    import jax.numpy as jnp

    from internvl_jax.models.compute import Compute
    from internvl_jax.models.intern_vit import Block
    from internvl_jax.models.llama import Llama
    from internvl_jax.nn.attend import Mask
    from internvl_jax.nn.stack import Stack

    config = case.config()
    unroll = case.layers
    compute = Compute(dtype=dtype, remat="none", unroll=unroll)
    if case.stack == "vit":
        layer = functools.partial(Block, config, compute)
        build = lambda rngs: Stack(layer, case.layers, rngs=rngs)
        one = lambda block, x: block(x, jnp.float32(0), None)
        call = lambda block, x, _, run: (run(block, one, x), None)
        return build, lambda m, x: m(call, x, dtype=dtype, unroll=unroll)[0]

    def decode(model: Any, x: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return model(x, positions, Mask(causal=True)).hidden

    return lambda rngs: Llama(config, compute, rngs=rngs), decode


def torch_stack(case: Case) -> Any:
    """The same layers in PyTorch."""
    import torch

    from tests.benchmarks.torch_clip import LlamaLayer, RMSNorm, VitBlock, rope_tables

    cls = VitBlock if case.stack == "vit" else LlamaLayer

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(
                cls(case.width, case.heads, case.mlp, 1e-6) for _ in range(case.layers)
            )
            last = RMSNorm(case.width, eps=1e-6)
            self.norm = torch.nn.Identity() if case.stack == "vit" else last
            cos, sin = rope_tables(case.tokens, case.width // case.heads, 10000.0)
            self.register_buffer("cos", cos)
            self.register_buffer("sin", sin)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            extra = () if case.stack == "vit" else ((self.cos.to(x.dtype), self.sin.to(x.dtype)),)
            for layer in self.layers:
                x = layer(x, *extra)
            return self.norm(x)

    return Layers()


def run_torch(case: Case) -> dict[str, float]:
    """Matrix rate, forward and training step of the same modules in PyTorch."""
    import torch

    if case.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU: install its CUDA build, or ask for --tiny.")
    torch.set_float32_matmul_precision("high")
    wait = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    a = torch.ones(case.matrix, case.matrix, dtype=torch.bfloat16, device=case.device)
    rate = 2 * case.matrix**3 / timed(lambda: a @ a, wait, case.count)

    torch.manual_seed(0)
    with torch.device(case.device):
        model = torch_stack(case)
        x = torch.randn(case.batch, case.tokens, case.width, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(case.device, torch.bfloat16):
            return model(x).float().square().mean()

    call = torch.compile(loss) if case.compiled else loss

    def forward() -> None:
        with torch.no_grad():
            call(x)

    def train() -> None:
        optimizer.zero_grad()
        call(x).backward()
        optimizer.step()

    forward_time = timed(forward, wait, case.count)
    return {"rate": rate, "forward": forward_time, "train": timed(train, wait, case.count)}


def turn(side: str, case: Case, python: str) -> dict[str, float]:
    """One side in a process of its own."""
    command = [python, "-m", "tests.benchmarks.gpu_blocks", "--turn", side]
    done = subprocess.run(
        [*command, json.dumps(dataclasses.asdict(case))], capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise SystemExit(f"{side}, {case.stack}:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix(MARK))


def measure(cases: dict[str, Case], rounds: int, pythons: dict[str, str]) -> dict[str, Any]:
    """All stacks, the sides in turns; medians over the rounds, and rates from them."""
    raw: dict[str, dict[str, list[dict[str, float]]]] = {
        name: {side: [] for side in SIDES} for name in cases
    }
    for number in range(rounds):
        for name, case in cases.items():
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                raw[name][side].append(turn(side, case, pythons[side]))
    every = [r["rate"] for by_side in raw.values() for runs in by_side.values() for r in runs]
    rate = max(every)
    out: dict[str, Any] = {"matrix_tflops": rate / 1e12, "stacks": {}}
    for name, case in cases.items():
        out["stacks"][name] = {"case": dataclasses.asdict(case)}
        for side in SIDES:
            for what, factor in (("forward", 1), ("train", 3)):
                seconds = statistics.median(r[what] for r in raw[name][side])
                out["stacks"][name][f"{side} {what}"] = {
                    "seconds": seconds,
                    "tokens_per_second": case.batch * case.tokens / seconds,
                    "mfu": factor * case.forward_flops() / seconds / rate,
                }
    return out


def show(result: dict[str, Any]) -> None:
    """Prints tokens/s and MFU."""
    print(f"matrix rate {result['matrix_tflops']:.2f} TFLOP/s (bfloat16)")
    for name, stack in result["stacks"].items():
        case = stack["case"]
        print(f"{name}: {case['layers']} layers of width {case['width']}, batch {case['batch']}")
        for what in ("forward", "train"):
            for side in SIDES:
                s = stack[f"{side} {what}"]
                print(
                    f"  {side:6} {what:8} {s['tokens_per_second']:12,.0f} tokens/s  "
                    f"MFU {100 * s['mfu']:5.1f} %"
                )


def card_memory() -> float:
    """Bytes of the first GPU. Raises SystemExit where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit("There is no NVIDIA GPU here; --tiny runs anywhere.") from None
    return float(done.stdout.split()[0]) * 2**20


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="tiny layers on the CPU, no figures")
    parser.add_argument("--torch_python", default=sys.executable, help="where its CUDA build is")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--turn", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        side, case = args.turn
        run = run_ours if side == "ours" else run_torch
        print(MARK + json.dumps(run(Case(**json.loads(case)))))
        return
    if args.tiny:
        cases, rounds = TINY, 1
    else:
        memory = card_memory()
        cases, rounds = {k: fitting(c, memory) for k, c in FULL.items()}, args.rounds
    result = measure(cases, rounds, {"ours": sys.executable, "torch": args.torch_python})
    show(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
