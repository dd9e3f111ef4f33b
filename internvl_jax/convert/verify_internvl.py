"""What the stored cases of InternVL-C and -G hold, computed by our model."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from internvl_jax.convert.case import Arrays, Case, numpy
from internvl_jax.models.attention_pool import AttentionPool
from internvl_jax.models.internvl import InternVL, unit
from internvl_jax.models.llama import DecoderLayer, Llama
from internvl_jax.models.qllama import causal_mask
from internvl_jax.nn.rope import rope_tables

TAP = re.compile(r"qllama\.layer(\d+)\.")


def internvl_c(case: Case) -> Arrays:
    """Features and logits of the contrastive mode."""
    return numpy(_both_towers(case, case.model(), "C"))


def internvl_g(case: Case) -> Arrays:
    """Features and logits of the generative mode, with the queries' way through QLLaMA."""
    model = case.model()
    result = _both_towers(case, model, "G")
    vision = result["image_tokens"]
    states = model.query_states(vision)
    result |= _pooling("clip_projector2", model.clip_projector2, states)
    result["query_hidden"] = states

    x = model.query_inputs(vision.shape[0])
    Q = x.shape[1]
    positions = jnp.broadcast_to(jnp.arange(Q), x.shape[:2])
    mask = jnp.ones((1, Q, Q), bool)
    layers = model.qllama(x, positions, mask, vision=vision, queries=Q, collect=True).layers
    result |= {f"qllama.layer{i}": y for i, y in enumerate(layers)}
    rope = rope_tables(positions, model.cfg.qllama.H, model.cfg.qllama.rope_theta)
    for i in sorted({int(m[1]) for m in map(TAP.match, case.outputs) if m}):
        if i >= model.cfg.qllama.depth:
            continue
        layer = decoder_layer(model.qllama, i)
        before = layers[i - 1] if i else x
        attended, _ = layer.attn(layer.norm1(before), rope, mask)
        result[f"qllama.layer{i}.self_attn"] = attended
        if layer.cross is not None:
            rows = before + attended
            result[f"qllama.layer{i}.cross_attn"] = layer.cross(rows, vision)
            result[f"qllama.layer{i}.cross_attn.norm1"] = layer.cross.norm1(rows)
            result[f"qllama.layer{i}.cross_attn.norm2"] = layer.cross.norm2(vision)
    return numpy(result)


def decoder_layer(decoder: Llama, index: int) -> DecoderLayer:
    """One layer of a decoder as a module of its own."""
    period, slot = divmod(index, decoder.cfg.period)
    whole = decoder.cfg.depth // decoder.cfg.period
    part = decoder.periods.layer(period) if period < whole else decoder.tail
    return part.layers[slot]


def _both_towers(case: Case, model: InternVL, mode: str) -> dict[str, jax.Array]:
    images, text = case.images(), case.ids("text")
    text_mask = text > 0  # the official encoder's rule, whatever the tokenizer pads with
    vision = model.image_tokens(images)
    positions = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape)
    hidden = model.qllama(model.qllama.embed(text), positions, causal_mask(text_mask)).hidden
    image = model.image_embedding(vision, mode)
    caption = model.text_embedding(text, text_mask)
    logits = model(images, text, text_mask, mode)
    return {
        "image_tokens": vision,
        **_pooling("clip_projector", model.clip_projector, vision),
        "image_features_raw": image,
        "image_features": unit(image),
        "text_hidden": hidden,
        "text_last_index": jnp.sum(text_mask, axis=1) - 1,
        "text_features_raw": caption,
        "text_features": unit(caption),
        "logits_per_image": logits,
        "logits_per_text": logits.T,
        "probs": jax.nn.softmax(logits, axis=-1),
    }


def _pooling(name: str, pool: AttentionPool, tokens: jax.Array) -> dict[str, jax.Array]:
    mean = jnp.mean(tokens, axis=1, keepdims=True)
    context = pool.context(tokens)
    return {
        f"{name}.norm1_q": pool.norm_q(mean),
        f"{name}.norm1_k": pool.norm_k(tokens),
        f"{name}.norm1_v": pool.norm_v(tokens),
        f"{name}.context": context.reshape(*context.shape[:2], -1),
        f"{name}_out": pool(tokens),
    }
