"""What the stored cases of InternVLChatModel and of transformers' InternVL hold, by our model.

Rows are padded left or right, tiles are numbered through the batch, and what stands on padding is
not compared: there the stored logits and ours are both set to zero.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.batch import IMAGE_TOKEN
from internvl_jax.convert.case import Arrays, Case, CaseError
from internvl_jax.convert.views import View
from internvl_jax.generate.cache import Start
from internvl_jax.generate.decode import decode
from internvl_jax.generate.settings import Settings
from internvl_jax.losses.captioning import next_token_loss
from internvl_jax.models.internvl_chat import InternVLChat
from internvl_jax.models.qllama import causal_mask, packed_positions, positions_of
from internvl_jax.nn.attend import Mask

NO_EOS = -1  # the stored searches never stop early


def hf_internvl(case: Case) -> Arrays:
    """Hidden states, features, logits, mean loss with gradients, greedy search of all rows."""
    result = _forward(case, case.config.get("image_token_id"), "loss", "grad")
    result["vision_last"] = result["vision_hidden_last"]
    return result | _greedy(case, case.config.get("image_token_id"), rows=None)


def official_internvl_chat(case: Case) -> Arrays:
    """As `hf_internvl`; the loss weighs answers by 1 / sqrt(length), row 0 is continued."""
    image = case.meta.get("spec", {}).get("ctx")
    result = _forward(case, image, "loss_square", "grad_square")
    result["vision_pooled_cls"] = result["vision_hidden_last"][:, 0]
    return result | _greedy(case, image, rows=1)


def _forward(case: Case, image: int | None, loss_name: str, prefix: str) -> Arrays:
    images, labels, mask = case.images(), case.ids("labels"), case.mask("attention_mask")
    # Each token of an answer weighs the same; without weights, each token of the batch does.
    weights = case.inputs.get("loss_weight", np.ones(labels.shape, np.float32))
    learned = np.asarray(labels[:, 1:]) >= 0
    total = float(np.sum(weights[:, 1:] * learned))
    row_weights = jnp.asarray(weights.max(axis=1))

    def objective(model: InternVLChat) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden: Any = model.vision(images, hidden=True).hidden
        states = [model.vision.embed(images), *hidden]
        features = model.visual_embeddings(images)
        x = _spliced(case, model, features, image)
        segment = mask.astype(jnp.int32)
        out = model.llm(x, packed_positions(segment), Mask(segment, causal=True)).hidden
        logits = model.llm.logits(out)
        loss = next_token_loss(logits, labels, row_weights=row_weights).loss / total
        plain = next_token_loss(logits, labels)
        return loss, {
            **{f"vision_hidden_{i}": x for i, x in enumerate(states)},
            "vision_hidden_last": states[-1],
            "image_features": features,
            "logits": logits,
            "loss_token_mean": plain.loss / plain.count,
        }

    (loss, result), gradient = case.differentiate(objective)
    for tensors in (result, case.outputs):
        tensors["logits"] = np.where(np.asarray(mask)[..., None], tensors["logits"], 0.0)
    named = case.named
    own = named.own if isinstance(named, View) else str
    gradients = {
        f"{prefix}.{own(name)}": case.keys.to_official(gradient, name) for name in case.keys.entries
    }
    return {**result, loss_name: loss, **gradients}


def _greedy(case: Case, image: int | None, rows: int | None) -> Arrays:
    """The continuation of the first rows (all if None), which must end with a token."""
    suffix = "" if rows is None else "_row0"
    if f"greedy{suffix}" not in case.outputs:
        return {}
    steps = case.outputs[f"greedy{suffix}"].shape[1]
    model, mask = case.model(), case.mask("attention_mask")

    def read(model: InternVLChat) -> dict[str, jax.Array]:
        x = _spliced(case, model, model.visual_embeddings(case.images()), image)[:rows]
        out = model.llm(x, positions_of(mask[:rows]), causal_mask(mask[:rows]))
        return {"logits": model.llm.logits(out.hidden[:, -1]), "k": out.kv[0], "v": out.kv[1]}

    prompt = jax.tree.map(jnp.asarray, case.run(read))
    start = Start(prompt["logits"], (prompt["k"], prompt["v"]), mask[:rows])
    settings = Settings(max_new_tokens=steps, eos_id=NO_EOS)
    found = decode(model.llm, start, settings, logits=True)
    logits = np.swapaxes(np.asarray(found.logits), 0, 1)
    return {f"greedy{suffix}": np.asarray(found.ids), f"greedy_logits{suffix}": logits}


def _spliced(case: Case, model: InternVLChat, features: jax.Array, image: int | None) -> jax.Array:
    """Embeddings [B, T, D] with the real tiles' features in the places of the image token."""
    if image is None:
        raise CaseError(f"{case.folder} does not say which id stands for an image.")
    if "image_flags" in case.inputs:  # empty tiles are encoded and dropped
        features = features[np.flatnonzero(case.input("image_flags"))]
    ids = case.ids("input_ids")
    text = jnp.where(ids == image, IMAGE_TOKEN, ids)
    # The tiles of all rows follow one another: one long row takes them in reading order.
    flat = features.reshape(1, -1, features.shape[-1])
    return model.splice(text.reshape(1, -1), flat).reshape(*text.shape, -1)
