"""What the stored cases of InternVL-C, InternVL-G and QLLaMA hold, computed by our model."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax.convert.case import Arrays, Case
from internvl_jax.models.attention_pool import AttentionPool
from internvl_jax.models.internvl import InternVL, unit
from internvl_jax.models.llama import DecoderLayer, Llama
from internvl_jax.models.qllama import causal_mask, query_text_mask
from internvl_jax.nn.rope import rope_tables

LAYER = re.compile(r"qllama\.layer(\d+)\.")
CACHE = re.compile(r"past_[kv]_layer(\d+)$")


def internvl_c(case: Case) -> Arrays:
    """Features and logits of the contrastive mode."""
    return case.run(lambda model: _both_towers(case, model, "C"))


def internvl_g(case: Case) -> Arrays:
    """Features and logits of the generative mode, with the queries' way through QLLaMA."""
    depth = case.architecture[0].qllama.depth
    taps = {int(m[1]) for m in map(LAYER.match, case.outputs) if m}

    def forward(model: InternVL) -> dict[str, jax.Array]:
        result = _both_towers(case, model, "G")
        vision = result["image_tokens"]
        states = model.query_states(vision)
        result |= _pooling("clip_projector2", model.clip_projector2, states)
        result["query_hidden"] = states

        x = model.query_inputs(vision.shape[0])
        Q = x.shape[1]
        positions = jnp.broadcast_to(jnp.arange(Q), x.shape[:2])
        mask = jnp.ones((1, Q, Q), bool)
        qllama = model.qllama
        layers: Any = qllama(x, positions, mask, vision=vision, queries=Q, collect=True).layers
        result |= {f"qllama.layer{i}": y for i, y in enumerate(layers)}
        rope = rope_tables(positions, qllama.cfg.H, qllama.cfg.rope_theta)
        for i in sorted(i for i in taps if i < depth):
            layer = decoder_layer(qllama, i)
            before = layers[i - 1] if i else x
            attended, _ = layer.attn(layer.norm1(before), rope, mask)
            result[f"qllama.layer{i}.self_attn"] = attended
            if layer.cross is not None:
                rows = before + attended
                result[f"qllama.layer{i}.cross_attn"] = layer.cross(rows, vision)
                result[f"qllama.layer{i}.cross_attn.norm1"] = layer.cross.norm1(rows)
                result[f"qllama.layer{i}.cross_attn.norm2"] = layer.cross.norm2(vision)
        return result

    return case.run(forward)


def qllama_lm(case: Case) -> Arrays:
    """The language model on [queries][text] rows and on text alone, its cache, and generation."""
    ids, text_mask = case.ids("input_ids"), case.mask("attention_mask")
    cfg = case.architecture[0]
    caches = sorted({int(m[1]) for m in map(CACHE.match, case.outputs) if m})

    def forward(model: InternVL) -> dict[str, jax.Array]:
        Q = cfg.queries
        vision = model.image_tokens(case.images())
        out = model.fused(vision, ids, query_text_mask(Q, text_mask, "itg"), collect=True)
        embedded = jnp.concatenate(
            [model.query_inputs(ids.shape[0]), model.qllama.embed(ids)], axis=1
        )
        result = {
            "image_tokens": vision,
            "inputs_embeds": embedded,
            "full_attention_mask": jnp.pad(
                text_mask, ((0, 0), (Q, 0)), constant_values=True
            ).astype(jnp.int32),
            # As the original counts: the embeddings, every layer but the last, the final norm.
            "hidden_states": jnp.concatenate([embedded[None], out.layers[:-1], out.hidden[None]]),
            "logits": model.qllama.logits(out.hidden),
        }
        for i in (i for i in caches if i < cfg.qllama.depth):
            result[f"past_k_layer{i}"], result[f"past_v_layer{i}"] = (
                x[i].transpose(0, 2, 1, 3) for x in out.kv
            )
        if "text_only_ids" in case.inputs:
            text = case.ids("text_only_ids")
            positions = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape)
            hidden = model.qllama(model.qllama.embed(text), positions, causal_mask(text > 0)).hidden
            result["text_only_hidden"] = hidden
            result["text_only_logits"] = model.qllama.logits(hidden)
        return result

    return case.run(forward) | _generation(case)


def _generation(case: Case) -> Arrays:
    """Every stored setting, by the rules of the newer transformers and of the older one."""
    from internvl_jax.convert.verify_generation import generation

    if not case.config.get("generation"):
        return {}
    model = case.model()
    result = generation(model, case.config, case.inputs)
    older = "generation_transformers_4.32.0"
    if any(name.startswith(f"{older}/") for name in case.outputs):
        again = generation(model, case.config, case.inputs, count_seed=True)
        result |= {f"{older}/{name}": x for name, x in again.items()}
    return result


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
