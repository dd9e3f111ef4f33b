"""The generation part of `verify`: every stored search setting of a `qllama_lm` case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from internvl_jax.generate.decode import decode
from internvl_jax.generate.prompt import caption_start
from internvl_jax.generate.settings import Settings
from internvl_jax.models.internvl import InternVL

_SEARCH = ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "early_stopping")
_PROMPT = ("input_ids", "attention_mask", "images")


def generation(
    model: InternVL,
    config: Mapping[str, Any],
    inputs: Mapping[str, np.ndarray],
    *,
    count_seed: bool = False,
) -> dict[str, np.ndarray]:
    """Runs all settings in ``config["generation"]``.

    Args:
        model: the case's model, float32.
        config: the case's ``config`` (with ``generation`` and ``qllama_config``).
        inputs: its ``in/`` tensors without that prefix; pixel_values [B, 3, S, S] normalised.
        count_seed: the length divisor of transformers 4.32, see `Settings`.

    Returns:
        ``gen.NAME.sequences`` int [B, width], ids after a BOS as transformers returns them, cut
        after the longest row; for beams ``gen.NAME.sequences_scores`` float32 [B]; for greedy
        search ``gen.NAME.scores`` float32 [steps, B, V], the processed logits of each step. A
        setting with options that are not offered here is left out.
    """
    ids = config["qllama_config"]
    pixels = np.transpose(inputs["pixel_values"], (0, 2, 3, 1))
    outputs: dict[str, np.ndarray] = {}
    for name, case in config.get("generation", {}).items():
        if not set(case) <= {*_SEARCH, *_PROMPT}:
            continue
        settings = Settings(
            eos_id=ids.get("eos_token_id", 2),
            pad_id=ids.get("pad_token_id", 0),
            bos_id=ids.get("bos_token_id", 1),
            count_seed=count_seed,
            **{option: case[option] for option in _SEARCH if option in case},
        )
        prompt, mask = inputs[case["input_ids"]], inputs[case["attention_mask"]] != 0
        chosen = case.get("images", list(range(len(prompt))))
        start = caption_start(model, pixels[chosen], prompt.astype(np.int32), mask)
        greedy = settings.num_beams == 1
        out = decode(model.qllama, start, settings, logits=greedy)
        longest = int(out.lengths.max())
        outputs[f"gen.{name}.sequences"] = np.asarray(out.ids[:, : 1 + longest])
        if out.logits is None:
            outputs[f"gen.{name}.sequences_scores"] = np.asarray(out.scores)
        else:
            outputs[f"gen.{name}.scores"] = np.asarray(out.logits[:longest])
    return outputs
