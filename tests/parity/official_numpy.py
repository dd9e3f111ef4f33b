"""InternVL once more, in numpy and float64, by the official names: for cases of other sizes.

Written from the papers' equations and the names of the released files alone: it shares no code
with the package. A weight exists once it is asked for, with the shape that is asked for, so the
names and shapes of a case are this file's own account of them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Array = np.ndarray


class Weights:
    """Random tensors by official name, made on demand."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.made: dict[str, Array] = {}

    def __call__(self, name: str, *shape: int) -> Array:
        if name not in self.made:
            x = self.rng.standard_normal(shape)
            if "norm" in name and name.endswith("weight"):
                x = 1 + 0.2 * x
            elif len(shape) > 1 and "embed" not in name and "tokens" not in name:
                x = x / math.sqrt(np.prod(shape[1:]))
            else:
                x = 0.3 * x
            self.made[name] = np.asarray(x, np.float32)
        assert self.made[name].shape == shape, name
        return self.made[name].astype(np.float64)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rms(w: Weights, name: str, x: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w(f"{name}.weight", x.shape[-1])


def layer_norm(w: Weights, name: str, x: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x * w(f"{name}.weight", x.shape[-1]) + w(f"{name}.bias", x.shape[-1])


def linear(w: Weights, name: str, x: Array, out: int, bias: bool = False) -> Array:
    y = x @ w(f"{name}.weight", out, x.shape[-1]).T
    return y + w(f"{name}.bias", out) if bias else y


def attention(q: Array, k: Array, v: Array, heads: int, allowed: Array | None = None) -> Array:
    """[B, T, D], [B, S, D] -> [B, T, D]; allowed [B, T, S]."""
    split = lambda x: x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    q, k, v = split(q), split(k), split(v)
    logits = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
    if allowed is not None:
        logits = np.where(allowed[:, None], logits, -1e30)
    return (softmax(logits) @ v).transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)


def vision(w: Weights, cfg: dict[str, Any], pixels: Array, prefix: str = "") -> list[Array]:
    """Hidden states of the vision tower, the embeddings first."""
    D, p, eps = cfg["hidden_size"], cfg["patch_size"], cfg["layer_norm_eps"]
    B, _, height, width = pixels.shape
    patches = pixels.reshape(B, 3, height // p, p, width // p, p).transpose(0, 2, 4, 1, 3, 5)
    kernel = w(f"{prefix}embeddings.patch_embedding.weight", D, 3, p, p).reshape(D, -1)
    x = patches.reshape(B, -1, 3 * p * p) @ kernel.T
    x = x + w(f"{prefix}embeddings.patch_embedding.bias", D)
    cls = np.broadcast_to(w(f"{prefix}embeddings.class_embedding", 1, 1, D), (B, 1, D))
    rows = 1 + (cfg["image_size"] // p) ** 2
    x = np.concatenate([cls, x], 1) + w(f"{prefix}embeddings.position_embedding", 1, rows, D)
    hidden = [x]
    erf = np.vectorize(math.erf)
    for i in range(cfg["num_hidden_layers"]):
        layer = f"{prefix}encoder.layers.{i}."
        y = rms(w, f"{layer}norm1", x, eps)
        qkv = linear(w, f"{layer}attn.qkv", y, 3 * D, cfg["qkv_bias"])
        q, k, v = np.split(qkv, 3, axis=-1)
        if cfg["qk_normalization"]:
            q, k = rms(w, f"{layer}attn.q_norm", q, eps), rms(w, f"{layer}attn.k_norm", k, eps)
        y = attention(q, k, v, cfg["num_attention_heads"])
        x = x + w(f"{layer}ls1", D) * linear(w, f"{layer}attn.proj", y, D, True)
        y = rms(w, f"{layer}norm2", x, eps)
        y = linear(w, f"{layer}mlp.fc1", y, cfg["intermediate_size"], True)
        y = 0.5 * y * (1 + erf(y / math.sqrt(2)))
        x = x + w(f"{layer}ls2", D) * linear(w, f"{layer}mlp.fc2", y, D, True)
        hidden.append(x)
    return hidden


def pool(w: Weights, name: str, x: Array, heads: int, out: int) -> Array:
    D = x.shape[-1]
    inputs = {"q": x.mean(1, keepdims=True), "k": x, "v": x}
    q, k, v = (
        linear(w, f"{name}.cross_attn.{c}", layer_norm(w, f"{name}.norm1_{c}", y), D)
        + w(f"{name}.cross_attn.{c}_bias", D)
        for c, y in inputs.items()
    )
    return linear(w, f"{name}.cross_attn.proj", attention(q, k, v, heads), out, True)[:, 0]


def rotate(x: Array, heads: int) -> Array:
    """Rotary embedding of [B, T, D], the halves of each head paired."""
    B, T, D = x.shape
    half = D // heads // 2
    angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = (f(angle)[None, :, None, :] for f in (np.cos, np.sin))
    x = x.reshape(B, T, heads, 2 * half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1).reshape(B, T, D)


def qllama(
    w: Weights, cfg: dict[str, Any], x: Array, allowed: Array, tokens: Array | None, queries: int
) -> list[Array]:
    """Outputs of all layers, the final norm's in place of the last; tokens [B, P, Dv]."""
    text = cfg["qllama_config"]
    D, heads, eps = text["hidden_size"], text["num_attention_heads"], text["rms_norm_eps"]
    states = []
    for i in range(text["num_hidden_layers"]):
        layer = f"qllama.model.layers.{i}."
        y = rms(w, f"{layer}input_layernorm", x, eps)
        q, k, v = (linear(w, f"{layer}self_attn.{c}_proj", y, D) for c in "qkv")
        y = attention(rotate(q, heads), rotate(k, heads), v, heads, allowed)
        x = x + linear(w, f"{layer}self_attn.o_proj", y, D)
        if i % cfg["cross_attention_frequency"] == 0 and tokens is not None:
            cross = f"{layer}cross_attn."
            rows = rms(w, f"{cross}norm1", x[:, :queries], eps)
            memory = rms(w, f"{cross}norm2", tokens, eps)
            q = linear(w, f"{cross}q_proj", rows, D)
            k, v = (linear(w, f"{cross}{c}_proj", memory, D) for c in "kv")
            read = linear(w, f"{cross}o_proj", attention(q, k, v, heads), D)
            x = np.concatenate([x[:, :queries] + read, x[:, queries:]], 1)
        y = rms(w, f"{layer}post_attention_layernorm", x, eps)
        F = text["intermediate_size"]
        gate, up = (linear(w, f"{layer}mlp.{c}_proj", y, F) for c in ("gate", "up"))
        x = x + linear(w, f"{layer}mlp.down_proj", gate / (1 + np.exp(-gate)) * up, D)
        states.append(x)
    return [*states[:-1], rms(w, "qllama.model.norm", x, eps)]


def words(w: Weights, cfg: dict[str, Any], ids: Array) -> Array:
    text = cfg["qllama_config"]
    return w("qllama.model.embed_tokens.weight", text["vocab_size"], text["hidden_size"])[ids]


def query_rows(w: Weights, cfg: dict[str, Any], rows: int) -> Array:
    Q, D = cfg["num_query_token"], cfg["qllama_config"]["hidden_size"]
    return np.repeat(w("query_tokens", 1, Q, D), rows, 0)


def allowed(queries: int, mask: Array, q_to_t: bool, t_to_q: bool, causal: bool) -> Array:
    """Who may look at whom in rows [queries][text]; mask [B, T]."""
    B, T = mask.shape
    result = np.zeros((B, queries + T, queries + T), bool)
    result[:, :queries, :queries] = True
    result[:, :queries, queries:] = q_to_t
    result[:, queries:, :queries] = t_to_q
    result[:, queries:, queries:] = np.tril(np.ones((T, T), bool)) if causal else True
    return result & np.concatenate([np.ones((B, queries), bool), mask > 0], 1)[:, None]


def text_states(w: Weights, cfg: dict[str, Any], ids: Array) -> Array:
    return qllama(w, cfg, words(w, cfg, ids), allowed(0, ids > 0, 0, 0, True), None, 0)[-1]


def project_text(w: Weights, cfg: dict[str, Any], hidden: Array, mask: Array) -> Array:
    last = hidden[np.arange(len(hidden)), mask.astype(int).sum(1) - 1]
    return last @ w("text_projection", hidden.shape[-1], cfg["clip_embed_dim"])


def heads(w: Weights, cfg: dict[str, Any]) -> None:
    """Asks for what a whole model has besides."""
    text = cfg["qllama_config"]
    w("qllama.lm_head.weight", text["vocab_size"], text["hidden_size"])
    w("itm_head.weight", 2, text["hidden_size"])
    w("itm_head.bias", 2)
    w("logit_scale")
    w("text_projection", text["hidden_size"], cfg["clip_embed_dim"])
    pools = cfg["attn_pool_num_heads"], cfg["clip_embed_dim"]
    for name, width in (
        ("clip_projector", cfg["vision_config"]["hidden_size"]),
        ("clip_projector2", text["hidden_size"]),
    ):
        pool(w, name, np.zeros((1, 1, width)), *pools)


def write(
    folder: Path, case: str, cfg: dict[str, Any], w: Weights, tensors: dict[str, Array]
) -> Path:
    """Writes a case in the format of the reference folders."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"case": case, "config": cfg, "meta": {}}))
    save_file(w.made, folder / "weights.safetensors")
    kind = lambda x: np.int64 if x.dtype.kind in "iub" else np.float32
    stored = {name: np.array(x, kind(x), order="C") for name, x in tensors.items()}
    save_file(stored, folder / "io.safetensors")
    return folder
