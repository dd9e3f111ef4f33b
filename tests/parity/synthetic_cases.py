"""Cases of sizes that no stored case has, with outputs by `official_numpy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import official_numpy as official
from official_numpy import Weights, allowed, pool, qllama, query_rows, unit, vision, words


def config(**changes: Any) -> dict[str, Any]:
    """A small InternVL with odd numbers; dotted names change what is nested."""
    cfg: dict[str, Any] = {
        "attn_pool_num_heads": 3,
        "clip_embed_dim": 11,
        "cross_attention_frequency": 2,
        "label_smoothing": 0.0,
        "num_query_token": 3,
        "qllama_config": {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 36,
            "intermediate_size": 50,
            "num_attention_heads": 3,
            "num_hidden_layers": 5,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-5,
            "vocab_size": 29,
        },
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": 45,
            "image_size": 21,
            "intermediate_size": 71,
            "layer_norm_eps": 1e-6,
            "num_attention_heads": 5,
            "num_hidden_layers": 3,
            "patch_size": 7,
            "qk_normalization": True,
            "qkv_bias": False,
        },
    }
    for name, value in changes.items():
        *outer, last = name.split("__")
        node = cfg
        for key in outer:
            node = node[key]
        node[last] = value
    return cfg


def texts(rng: np.random.Generator, cfg: dict[str, Any], lengths: list[int]) -> np.ndarray:
    """Right-padded rows BOS ... EOS."""
    ids = np.zeros((len(lengths), max(lengths)), np.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = rng.integers(3, cfg["qllama_config"]["vocab_size"], length)
        row[0], row[length - 1] = 1, 2
    return ids


def pixels(rng: np.random.Generator, cfg: dict[str, Any], count: int) -> np.ndarray:
    side = cfg["vision_config"]["image_size"]
    return rng.standard_normal((count, 3, side, side)).astype(np.float32)


def features(folder: Path, cfg: dict[str, Any], mode: str, seed: int) -> Path:
    """InternVL-C or -G: features and logits."""
    w, rng = Weights(seed), np.random.default_rng(seed + 1)
    images, ids = pixels(rng, cfg, 2), texts(rng, cfg, [4, 7, 2])
    pools = cfg["attn_pool_num_heads"], cfg["clip_embed_dim"]
    tokens = vision(w, cfg["vision_config"], images.astype(np.float64), "vision_model.")[-1]
    out = {"image_tokens": tokens, "clip_projector_out": pool(w, "clip_projector", tokens, *pools)}
    rows = query_rows(w, cfg, len(images))
    Q = rows.shape[1]
    states = qllama(w, cfg, rows, np.ones((2, Q, Q), bool), tokens, Q)
    image = out["clip_projector_out"]
    if mode == "G":
        out |= {f"qllama.layer{i}": x for i, x in enumerate(states[:-1])}
        out["query_hidden"] = states[-1]
        image = unit(image) + unit(pool(w, "clip_projector2", states[-1], *pools))
    out["text_hidden"] = official.text_states(w, cfg, ids)
    text = official.project_text(w, cfg, out["text_hidden"], ids > 0)
    official.heads(w, cfg)
    logits = np.exp(w("logit_scale")) * unit(image) @ unit(text).T
    out |= {"image_features_raw": image, "text_features_raw": text}
    out |= {"logits_per_image": logits, "probs": official.softmax(logits)}
    return _write(
        folder, f"internvl_{mode.lower()}", cfg, w, {"pixel_values": images, "text": ids}, out
    )


def language(folder: Path, cfg: dict[str, Any], seed: int) -> Path:
    """QLLaMA as a language model on [queries][text], right-padded."""
    w, rng = Weights(seed), np.random.default_rng(seed + 1)
    images, ids = pixels(rng, cfg, 3), texts(rng, cfg, [6, 3, 5])
    mask = (ids > 0).astype(np.int64)
    tokens = vision(w, cfg["vision_config"], images.astype(np.float64), "vision_model.")[-1]
    rows = query_rows(w, cfg, 3)
    Q = rows.shape[1]
    x = np.concatenate([rows, words(w, cfg, ids)], 1)
    states = qllama(w, cfg, x, allowed(Q, mask, False, True, True), tokens, Q)
    official.heads(w, cfg)
    text = cfg["qllama_config"]
    head = w("qllama.lm_head.weight", text["vocab_size"], text["hidden_size"])
    out = {"hidden_states": np.stack([x, *states]), "logits": states[-1] @ head.T}
    inputs = {"pixel_values": images, "input_ids": ids, "attention_mask": mask}
    return _write(folder, "qllama_lm", cfg, w, inputs, out)


def tower(folder: Path, cfg: dict[str, Any], seed: int) -> Path:
    """The vision tower alone."""
    w, rng = Weights(seed), np.random.default_rng(seed + 1)
    images = pixels(rng, cfg, 2)
    hidden = vision(w, cfg["vision_config"], images.astype(np.float64))
    out = {"hidden_states": np.stack(hidden), "pooler_output": hidden[-1][:, 0]}
    cfg = {"vision_config": cfg["vision_config"]}
    return _write(folder, "internvit", cfg, w, {"pixel_values": images}, out)


def losses(folder: Path, cfg: dict[str, Any], variant: str, seed: int) -> Path:
    """The stage-2 losses of one process, with an empty caption and an empty summary."""
    w, rng = Weights(seed), np.random.default_rng(seed + 1)
    cfg = {**cfg, "variant": variant}
    B, T = 4, 8
    images = pixels(rng, cfg, B)
    ids = {
        "positive": texts(rng, cfg, [5, T, 4, 3]),
        "negative": texts(rng, cfg, [6, 2, T, 5]),
        "summarize": texts(rng, cfg, [T, 6, 5, 7]),
        "": texts(rng, cfg, [7, T, 6, 4]),
    }
    masks = {name: (x > 0).astype(np.int64) for name, x in ids.items()}
    labels = np.where(masks[""] > 0, ids[""], -100)
    labels[:, :2] = -100
    groups = np.array([[3], [5], [3], [9]])

    tokens = vision(w, cfg["vision_config"], images.astype(np.float64), "vision_model.")[-1]
    Q = cfg["num_query_token"]
    pools = cfg["attn_pool_num_heads"], cfg["clip_embed_dim"]
    full, apart, caption = (True, True, False), (False, False, True), (False, True, True)
    if variant == "retrieval":
        tasks = [("negative", full), ("positive", full), ("summarize", apart)]
    else:
        ids["match"] = np.concatenate(
            [ids["negative"][: B - B // 2], ids["positive"][B - B // 2 :]]
        )
        masks["match"] = (ids["match"] > 0).astype(np.int64)
        tasks = [("match", full), ("summarize", apart), ("", caption)]
    x = np.concatenate([query_rows(w, cfg, 3 * B), words(w, cfg, _stack(ids, tasks))], 1)
    look = np.concatenate([allowed(Q, masks[name], *rule) for name, rule in tasks])
    states = qllama(w, cfg, x, look, np.concatenate([tokens] * 3), Q)[-1]
    official.heads(w, cfg)

    first, second, third = np.split(states, 3)
    itm = np.concatenate([first, second]) if variant == "retrieval" else first
    itc = third if variant == "retrieval" else second
    head = official.linear(w, "itm_head", itm[:, :Q], 2, True)
    match = np.arange(len(itm)) >= len(itm) - (B if variant == "retrieval" else B // 2)
    image = pool(w, "clip_projector2", itc[:, :Q], *pools)
    backbone = pool(w, "clip_projector", tokens, *pools)
    text = official.project_text(w, cfg, itc[:, Q:], masks["summarize"])
    scale = np.exp(w("logit_scale"))
    right = np.eye(B)
    kept, told = np.ones(len(itm), bool), np.ones(B, bool)
    if variant == "retrieval":
        right = (groups == groups.T) / (groups == groups.T).sum(1, keepdims=True)
    else:
        kept, told = masks["match"].sum(1) != 2, masks["summarize"].sum(1) != 5
    out = {
        "loss_itm": _entropy(head.mean(1), np.eye(2)[match.astype(int)])[kept].mean(),
        "loss_itc": _contrast(image, text, scale, right, told),
        "itm_head_out": head,
        "image_itc_raw": image,
        "backbone_embeds_raw": backbone,
        "attention_mask_4d_blocked": ~look[:, None],
    }
    if variant == "retrieval":
        out["loss_itc"] += _contrast(backbone, text, scale, right, told)
    else:
        logits = third[:, Q:] @ w("qllama.lm_head.weight", *w.made["qllama.lm_head.weight"].shape).T
        learned = labels[:, 1:] >= 0
        target = np.eye(logits.shape[-1])[np.maximum(labels[:, 1:], 0)]
        out["loss_itg"] = _entropy(logits[:, :-1], target)[learned].mean()
    out["loss"] = sum(x for name, x in out.items() if name.startswith("loss_"))
    inputs = {"pixel_values": images, "labels": labels, "image_ids": groups}
    for name, short in (("positive", "positive_"), ("negative", "negative_")):
        inputs |= {f"{short}input_ids": ids[name], f"{short}attention_mask": masks[name]}
    inputs |= {"summarize_input_ids": ids["summarize"], "input_ids": ids[""]}
    inputs |= {"summarize_attention_mask": masks["summarize"], "attention_mask": masks[""]}
    return _write(folder, "stage2", cfg, w, inputs, out)


def _stack(ids: dict[str, np.ndarray], tasks: list[tuple[str, Any]]) -> np.ndarray:
    return np.concatenate([ids[name] for name, _ in tasks])


def _entropy(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    return -(np.log(official.softmax(logits)) * target).sum(-1)


def _contrast(
    image: np.ndarray, text: np.ndarray, scale: float, right: np.ndarray, kept: np.ndarray
) -> float:
    logits = scale * unit(image) @ unit(text).T
    return (_entropy(logits, right)[kept].mean() + _entropy(logits.T, right)[kept].mean()) / 2


def _write(
    folder: Path,
    kind: str,
    cfg: dict[str, Any],
    w: Weights,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
) -> Path:
    tensors = {f"in/{n}": np.asarray(x) for n, x in inputs.items()}
    tensors |= {f"out/{n}": np.asarray(x) for n, x in outputs.items()}
    return official.write(folder, kind, cfg, w, tensors)
