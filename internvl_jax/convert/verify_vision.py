"""What the stored cases of the vision tower hold, computed by our model."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.convert.case import Arrays, Case, numpy
from internvl_jax.models.intern_vit import InternViT
from internvl_jax.nn.embed import resize_positions

TAP = re.compile(r"layer(\d+)\.")


def internvit(case: Case) -> Arrays:
    """Embeddings, hidden states, what happens inside layers, and gradients."""
    model = case.model()
    images = case.images()
    embedded = model.embed(images)
    out = model(images, hidden=True)
    hidden = jnp.concatenate([embedded[None], out.hidden])
    result = {
        "embeddings": embedded,
        "hidden_states": hidden,
        "last_hidden_state": out.tokens,
        "pooler_output": out.tokens[:, 0],
    }
    for layer in sorted({int(m[1]) for m in map(TAP.match, case.outputs) if m}):
        if layer < model.cfg.depth:
            result |= {f"layer{layer}.{k}": v for k, v in inside(model, layer, hidden[layer]).items()}

    if "cotangent" not in case.inputs:
        return numpy(result)
    cotangent = jnp.asarray(case.input("cotangent"))
    graph, params = nnx.split(model)

    def objective(params: nnx.State) -> jax.Array:
        return jnp.sum(nnx.merge(graph, params)(images).tokens * cotangent)

    result["grad_loss"], gradient = jax.value_and_grad(objective)(params)
    return numpy(result) | case.gradients(gradient)


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
    return result | {
        "norm2": normed,
        "mlp.act": block.mlp.hidden(normed),
        "mlp": block.mlp(normed),
        "output": x + block.ls2[...] * block.mlp(normed),
    }


def internvit_interp(case: Case) -> Arrays:
    """The tower at other sizes than its table's, square or not."""
    model = case.model()
    result = {}
    for name in case.inputs:
        size, _, what = name.rpartition(".")
        if what != "pixel_values":
            continue
        images = case.images(name)
        grid = tuple(n // model.cfg.patch_size for n in images.shape[1:3])
        result[f"{size}.position_embedding"] = resize_positions(model.pos[...], grid)[None]
        result[f"{size}.embeddings"] = model.embed(images)
        result[f"{size}.last_hidden_state"] = model(images).tokens
    return numpy(result)
