"""What the stored cases of the stage-2 losses hold, computed by the stage that trains.

The loss is `GenerativeStage.grouped_loss` itself; what happens inside is recorded while it runs.
Rows per image are consecutive here; the original stacks its tasks in blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.batch import MEAN, STD
from internvl_jax.convert.case import EXACT, Arrays, Case, CaseError
from internvl_jax.losses.contrastive import softmax_loss
from internvl_jax.models.internvl import InternVL
from internvl_jax.stages.generative import GenerativeStage

# Constants of the official losses: tokens of an empty caption, bare and after "summarize:". The
# retrieval loss ignores no row.
VARIANTS = {
    "stage2": {"variant": "pretrain", "empty_caption": 2, "empty_summary": 5},
    "retrieval": {"variant": "retrieval", "empty_caption": None, "empty_summary": None},
}
RANK = re.compile(r"rank(\d+)\.pixel_values$")
TEXTS = {
    "positive": "positive_",
    "negative": "negative_",
    "summarize": "summarize_",
    "text": "",
}


RECORDED = ("image_tokens", "fused", "match_logits", "clip_projector", "clip_projector2")


def record(model: InternVL) -> dict[str, tuple[tuple[Any, ...], Any]]:
    """Makes a model remember the arguments and results of `RECORDED` while a loss runs."""
    calls: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def remembering(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] = args, method(*args, **kwargs)
            return calls[name][1]

        return call

    for name in RECORDED:
        # Past the module's own bookkeeping: these are no parts of the model.
        object.__setattr__(model, name, remembering(name, getattr(model, name)))
    return calls


def stage2(case: Case) -> Arrays:
    """One process: losses, what happens inside, gradients of all parameters."""
    batch = _batch(case, "")
    (loss, seen), gradient = case.differentiate(lambda model: _loss(case, model, batch, groups=1))
    return {"loss": loss, **seen, **case.gradients(gradient)}


def stage2_2rank(case: Case) -> Arrays:
    """Several processes: one global batch in as many groups; their mean is what is trained."""
    ranks = sorted(int(m[1]) for m in map(RANK.match, case.inputs) if m)
    if not ranks:
        raise CaseError(f"{case.folder}/io.safetensors lacks in/rank0.pixel_values.")
    parts = [_batch(case, f"rank{r}.") for r in ranks]
    batch = {name: jnp.concatenate([p[name] for p in parts]) for name in parts[0]}
    (loss, seen), gradient = case.differentiate(
        lambda model: _loss(case, model, batch, groups=len(ranks))
    )
    result = {"mean.loss": loss, **case.gradients(gradient, "grad_mean")}
    result |= {f"mean.{name}": x for name, x in seen.items() if name.startswith("loss_")}

    rows = batch["image"].shape[0] // len(ranks)
    alone = case.compiled(lambda model, part: _loss(case, model, part, groups=1)[1])
    for i, (rank, part) in enumerate(zip(ranks, parts, strict=True)):
        own = slice(i * rows, (i + 1) * rows)
        # Matching and captioning see a rank's own rows only, the contrastive loss all of them.
        terms = {n: x for n, x in alone(part).items() if n in ("loss_itm", "loss_itg")}
        terms["loss_itc"] = _itc_of_rank(case, seen, batch, own)
        result |= {f"rank{rank}.{name}": x for name, x in terms.items()}
        result[f"rank{rank}.loss"] = np.asarray(sum(terms.values()))
        for name in ("image_itc_raw", "backbone_embeds_raw"):
            result[f"rank{rank}.{name}"] = seen[name][own]
    return result


def _stage(case: Case) -> GenerativeStage:
    variant = case.config.get("variant", "stage2")
    if variant not in VARIANTS:
        known = " or ".join(VARIANTS)
        raise CaseError(f"{case.folder}: the loss variant {variant!r} is unknown, use {known}.")
    return GenerativeStage(
        model=case.architecture[0],
        compute=EXACT,
        **VARIANTS[variant],
        trainable_paths=("",),
        label_smoothing=case.config.get("label_smoothing", 0.0),
    )


def _batch(case: Case, prefix: str) -> dict[str, jax.Array]:
    """A stored batch in our layout, images as the pixels they were normalised from."""
    mean, std = (np.asarray(v, np.float32) * 255 for v in (MEAN, STD))
    batch = {"image": case.images(f"{prefix}pixel_values") * std + mean}
    for ours, theirs in TEXTS.items():
        batch[ours] = case.ids(f"{prefix}{theirs}input_ids")
        batch[f"{ours}_mask"] = case.mask(f"{prefix}{theirs}attention_mask")
    batch["labels"] = case.ids(f"{prefix}labels")
    if f"{prefix}image_ids" in case.inputs:
        batch["image_id"] = case.ids(f"{prefix}image_ids").reshape(-1)
    return batch


def _loss(
    case: Case, model: InternVL, batch: dict[str, jax.Array], groups: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The stage's loss; its terms and what happened inside, rows in the official order."""
    stage = _stage(case)
    B, Q = batch["image"].shape[0], stage.model.queries
    calls = record(model)
    loss, metrics = stage.grouped_loss(model, batch, None, groups=groups)
    if "clip_projector" not in calls:  # the pre-training loss merely logs it
        model.clip_projector(calls["image_tokens"][1])
    returned = {name: result for name, (_, result) in calls.items()}
    _, _, masks = calls["fused"][0]

    def blocks(x: jax.Array) -> jax.Array:
        """Rows b * R + r -> r * B + b."""
        return x.reshape(B, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    hidden = blocks(returned["fused"].hidden)
    head = blocks(returned["match_logits"])
    itc = hidden[2 * B :] if stage.variant == "retrieval" else hidden[B : 2 * B]
    seen = {
        "image_tokens": returned["image_tokens"],
        "attention_mask_4d_blocked": ~blocks(masks)[:, None],
        "qllama_out": hidden,
        "itm_head_out": head,
        "itm_logits": jnp.mean(head, axis=1),
        "image_itc_raw": returned["clip_projector2"],
        "text_itc_raw": model.project_text(itc[:, Q:], batch["summarize_mask"]),
        "backbone_embeds_raw": returned["clip_projector"],
        "log_scale": model.logit_scale[...],
        **{name: x for name, x in metrics.items() if name.startswith("loss_")},
    }
    if stage.variant == "pretrain":
        seen["itg_logits"] = model.qllama.logits(hidden[2 * B :, Q:])
    return loss, seen


def _itc_of_rank(case: Case, seen: Arrays, batch: dict[str, Any], own: slice) -> np.ndarray:
    """The contrastive loss of one rank's rows against the global batch."""
    stage = _stage(case)
    retrieval = stage.variant == "retrieval"
    lengths = np.asarray(batch["summarize_mask"]).sum(1)
    kept = np.zeros(len(lengths), np.float32)
    kept[own] = lengths[own] != stage.empty_summary
    images = ("image_itc_raw", "backbone_embeds_raw") if retrieval else ("image_itc_raw",)
    losses = (
        softmax_loss(
            jnp.asarray(seen[name]),
            jnp.asarray(seen["text_itc_raw"]),
            jnp.asarray(seen["log_scale"]),
            weights=jnp.asarray(kept / max(kept.sum(), 1.0)),
            ids=batch["image_id"] if retrieval else None,
            label_smoothing=0.0 if retrieval else stage.label_smoothing,
        )[0]
        for name in images
    )
    return np.asarray(sum(losses))
