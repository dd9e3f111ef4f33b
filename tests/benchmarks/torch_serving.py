"""How fast the exported runtime serves, beside plain eager modules with the same weights.

``python -m tests.benchmarks.torch_serving [--size tiny|small|300m|6b] [--device …] [--dtype …]``

The other side is written as the reference modules are: attention with its own softmax, norms in
single operations, keys and values concatenated token by token, repeated for grouped queries.
Rounds alternate between the sides, so that other load hits both; figures are medians. On a CPU
they count processor time, which other load disturbs least: give one thread to have seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_jax.convert.runtime.chat import InternVLChat
from internvl_jax.convert.runtime.config import ChatConfig, DecoderConfig, VitConfig
from internvl_jax.convert.runtime.generate import Settings, Writer, left_pad

NEVER = -1


def sizes(name: str) -> ChatConfig:
    """A vision tower and a decoder with grouped queries behind ``mlp1``."""
    width, depth, heads, mlp, image, llm, layers = {
        "tiny": (128, 2, 2, 256, 28, 128, 2),
        "small": (384, 12, 6, 1536, 224, 512, 8),
        "300m": (1024, 24, 16, 4096, 448, 2048, 16),
        "6b": (3200, 48, 25, 12800, 224, 4096, 32),
    }[name]
    large = name in ("300m", "6b")
    vision = VitConfig(
        image, 14, width, depth, heads, mlp, "rms", qk_norm=True, qkv_bias=False, eps=1e-6
    )
    decoder = DecoderConfig(
        vocab_size=32000 if large else 8000,
        width=llm,
        depth=layers,
        heads=llm // (128 if large else 64),
        kv_heads=llm // (512 if large else 128),
        head_dim=128 if large else 64,
        mlp_dim=llm * 11 // 4,
        eps=1e-6,
        rope_theta=1e4,
        qkv_bias=False,
        out_bias=False,
        qk_norm=False,
        tied_head=False,
        head=True,
        cross_frequency=0,
        vision_width=0,
    )
    return ChatConfig(vision, decoder, None, 0, "mlp1", "v2", -1)


def drawn(cfg: ChatConfig, device: str, dtype: torch.dtype) -> InternVLChat:
    """A model with random weights that keep activations in range."""
    with torch.device("meta"):
        model = InternVLChat(cfg)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for tensor in model.parameters():
        if tensor.ndim > 1:
            tensor.normal_(0, tensor.shape[-1] ** -0.5)
        else:
            tensor.normal_(1, 0.1)
    return model


def norm(x: Tensor, layer: Any) -> Tensor:
    """RMSNorm in single operations."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + layer.eps)
    return layer.weight * wide.to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, N, T, H] each; the scores [B, N, T, S] rest in memory."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2).flatten(2)


def encode(model: InternVLChat, images: Tensor) -> Tensor:
    """The vision tower, [B, S, S, 3] -> [B, P, D]."""
    vit: Any = model.vision_model
    weight = vit.embeddings.patch_embedding.weight
    images = images.to(weight.dtype).permute(0, 3, 1, 2)
    x = F.conv2d(images, weight, vit.embeddings.patch_embedding.bias, stride=weight.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([vit.embeddings.class_embedding.expand(len(x), -1, -1), x], 1)
    x = x + vit.embeddings.position_embedding
    for block in vit.encoder["layers"]:
        attn = block.attn
        B, P = x.shape[:2]
        qkv = attn.qkv(norm(x, block.norm1)).reshape(B, P, 3, attn.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        wide = lambda t: t.transpose(1, 2).flatten(2)
        back = lambda t: t.view(B, P, attn.heads, -1).transpose(1, 2)  # noqa: B023
        q, k = back(norm(wide(q), attn.q_norm)), back(norm(wide(k), attn.k_norm))
        x = x + attn.proj(attention(q, k, v)) * block.ls1
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(norm(x, block.norm2)))) * block.ls2
    return x


def decode(
    llm: Any, x: Tensor, positions: Tensor, mask: Tensor, past: list[tuple[Tensor, Tensor] | None]
) -> Tensor:
    """Some tokens after `past`, which grows; the logits of the last one."""
    cfg, (B, T, _) = llm.cfg, x.shape
    steps = torch.arange(0, cfg.head_dim, 2, device=x.device).float() / cfg.head_dim
    angles = positions[:, None, :, None].float() * cfg.rope_theta**-steps
    cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in (angles.cos(), angles.sin()))

    def rotate(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin

    for i, layer in enumerate(llm.model["layers"]):
        attn, h = layer.self_attn, norm(x, layer.input_layernorm)
        split = lambda t: t.view(B, T, -1, cfg.head_dim).transpose(1, 2)
        q, k = rotate(split(attn.q_proj(h))), rotate(split(attn.k_proj(h)))
        v = split(attn.v_proj(h))
        before = past[i]
        if before is not None:
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        past[i] = k, v
        group = cfg.heads // cfg.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        x = x + attn.o_proj(attention(q, k, v, mask))
        h, mlp = norm(x, layer.post_attention_layernorm), layer.mlp
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return llm.lm_head(norm(x, llm.model["norm"])[:, -1]).float()


def greedy(llm: Any, x: Tensor, mask: Tensor, new: int) -> Tensor:
    """`new` tokens after left-padded embeddings, [B, new]."""
    B, P = mask.shape
    least = torch.finfo(x.dtype).min
    positions = (mask.cumsum(1) - 1).masked_fill(~mask, 1)
    allowed = mask[:, None] & torch.ones(P, P, dtype=torch.bool, device=x.device).tril()
    added = torch.zeros(B, 1, P, P, dtype=x.dtype, device=x.device)
    added = added.masked_fill(~allowed[:, None], least)
    past: list[Any] = [None] * llm.cfg.depth
    logits, ids = decode(llm, x, positions, added, past), []
    for _ in range(new):
        ids.append(logits.argmax(-1))
        if len(ids) == new:
            break
        mask = F.pad(mask, (0, 1), value=True)
        added = torch.zeros(B, 1, 1, mask.shape[1], dtype=x.dtype, device=x.device)
        added = added.masked_fill(~mask[:, None, None], least)
        position = mask.sum(1, keepdim=True) - 1
        logits = decode(llm, llm.embed(ids[-1][:, None]), position, added, past)
    return torch.stack(ids, 1)


def compare(sides: dict[str, Callable[[], Any]], rounds: int, cuda: bool) -> dict[str, list[float]]:
    """Seconds of every round of every side, in turn; one round before them is not counted."""
    clock = time.perf_counter if cuda else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            begun = clock()
            side()
            if cuda:
                torch.cuda.synchronize()
            if number:
                seconds[name].append(clock() - begun)
        print(f"\rround {number} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def report(what: str, unit: str, count: int, seconds: dict[str, list[float]]) -> str:
    """One line: both speeds and the median of the rounds' ratios."""
    ratio = statistics.median(e / o for e, o in zip(seconds["eager"], seconds["ours"]))
    speeds = {name: count / statistics.median(s) for name, s in seconds.items()}
    text = ", ".join(f"{name} {speed:,.1f} {unit}/s" for name, speed in speeds.items())
    return f"{what}: {text}; ours is {ratio:.2f} times as fast"


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    """Prints the versions, the checks and two lines of figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "small", "300m", "6b"), default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new", type=int, default=64, help="tokens written")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--compile", action="store_true", help="let ours be compiled")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    cuda, B = arguments.device.startswith("cuda"), arguments.batch
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if cuda else "float32"))
    name = torch.cuda.get_device_name() if cuda else f"CPU, {arguments.threads} threads"
    cfg = sizes(arguments.size)
    model = drawn(cfg, arguments.device, dtype)
    print(f"torch {torch.__version__}, {name}, {dtype}, size {arguments.size}, batch {B}")

    side = cfg.vision.image_size
    images = torch.randn(B, side, side, 3, device=arguments.device)
    expected = encode(model, images)
    if arguments.compile:
        model.vision_model.compile()
    ours = lambda: model.vision_model(images)[0]
    gap = (ours() - expected).abs().max() / expected.abs().max()
    sides = {"ours": ours, "eager": lambda: encode(model, images)}
    print(f"encoding differs by {gap:.1e} of the largest")
    print(report("encoding", "pictures", B, compare(sides, arguments.rounds, cuda)), flush=True)

    lengths = [48 + 4 * (i % 5) for i in range(B)]
    rows = [[1, *torch.randint(3, cfg.llm.vocab_size, (n,)).tolist()] for n in lengths]
    ids, mask = (t.to(arguments.device) for t in left_pad(rows, 0))
    settings = Settings(max_new_tokens=arguments.new, eos_id=NEVER)
    llm, writer = model.language_model, Writer(model.language_model, arguments.compile)
    ours = lambda: writer(model.read(None, ids, mask), settings).ids
    eager = lambda: greedy(llm, llm.embed(ids), mask, arguments.new)
    same = (ours() == eager()).float().mean()
    print(f"{100 * same:.1f} % of the written ids are the same")
    sides = {"ours": ours, "eager": eager}
    count = B * arguments.new
    print(report("writing", "tokens", count, compare(sides, arguments.rounds, cuda)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
