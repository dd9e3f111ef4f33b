"""What the stored cases of the vision tower hold, computed by our model."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.convert.case import Arrays, Case
from internvl_jax.models.intern_vit import InternViT
from internvl_jax.nn.embed import resize_positions

TAP = re.compile(r"layer(\d+)\.")


def internvit(case: Case) -> Arrays:
    """Embeddings, hidden states, what happens inside layers, and gradients."""
    images = case.images()
    depth = case.architecture[0].depth
    taps = sorted({int(m[1]) for m in map(TAP.match, case.outputs) if m})

    def forward(model: InternViT) -> dict[str, jax.Array]:
        embedded = model.embed(images)
        out: Any = model(images, hidden=True)
        hidden = jnp.concatenate([embedded[None], out.hidden])
        result = {
            "embeddings": embedded,
            "hidden_states": hidden,
            "last_hidden_state": out.tokens,
            "pooler_output": out.tokens[:, 0],
        }
        for i in (i for i in taps if i < depth):
            result |= {f"layer{i}.{name}": x for name, x in inside(model, i, hidden[i]).items()}
        return result

    result = case.run(forward)
    if "cotangent" not in case.inputs:
        return result
    cotangent = case.input("cotangent")

    def objective(model: InternViT) -> tuple[jax.Array, None]:
        return jnp.sum(model(images).tokens * cotangent), None

    (result["grad_loss"], _), gradient = case.differentiate(objective)
    # A signed sum of many terms: rounding is proportional to them, not to what they leave.
    terms = result["last_hidden_state"].astype(np.float64) * cotangent
    case.scales["grad_loss"] = float(np.sqrt(np.sum(terms**2)))
    return result | case.gradients(gradient)


def inside(model: InternViT, index: int, x: jax.Array) -> dict[str, jax.Array]:
    """Intermediate results of one layer, in the official layout; x [B, P, D] enters it."""
    block = model.blocks.layer(index)
    attn, normed = block.attn, block.norm1(x)
    flat = (*x.shape[:2], -1)
    q, k, v = attn.project(normed)
    result = {
        "norm1": normed,
        "attn.qkv": jnp.stack([q, k, v], axis=2).reshape(flat),
        "attn.context": attn.context(normed).reshape(flat),
        "attn": attn(normed),
    }
    if attn.q_norm is not None:
        result["attn.q_norm_out"] = attn.q_norm(q).reshape(flat)
    if attn.k_norm is not None:
        result["attn.k_norm_out"] = attn.k_norm(k).reshape(flat)
    x = x + block.ls1[...] * result["attn"]
    normed = block.norm2(x)
    result |= {"norm2": normed, "mlp.act": block.mlp.hidden(normed), "mlp": block.mlp(normed)}
    return result | {"output": x + block.ls2[...] * result["mlp"]}


def internvit_interp(case: Case) -> Arrays:
    """The tower at other sizes than its table's, square or not."""
    sizes = [n.removesuffix(".pixel_values") for n in case.inputs if n.endswith(".pixel_values")]

    def forward(model: InternViT) -> dict[str, jax.Array]:
        result = {}
        for size in sizes:
            images = case.images(f"{size}.pixel_values")
            rows, columns = (n // model.cfg.patch_size for n in images.shape[1:3])
            grid = (rows, columns)
            result[f"{size}.position_embedding"] = resize_positions(model.pos[...], grid)[None]
            result[f"{size}.embeddings"] = model.embed(images)
            result[f"{size}.last_hidden_state"] = model(images).tokens
        return result

    return case.run(forward)
