"""Sizes that no stored case has, against an independent float64 implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic_cases import config, features, language, losses, tower

from internvl_jax.convert.verify import verify

# Cross-attention in every layer; a depth the frequency does not divide; one beyond the depth.
SIZES: dict[str, dict[str, Any]] = {
    "frequency 1": {"cross_attention_frequency": 1, "qllama_config__num_hidden_layers": 2},
    "frequency 3 of 7": {
        "cross_attention_frequency": 3,
        "qllama_config__num_hidden_layers": 7,
        "num_query_token": 4,
    },
    "frequency 9 of 5": {"cross_attention_frequency": 9, "num_query_token": 1},
    "one wide head": {"attn_pool_num_heads": 1, "qllama_config__num_attention_heads": 1},
}


def assert_passes(folder: Path) -> None:
    report = verify(folder)
    assert report.compared and report.passed, [c for c in report.compared if not c.passed]


@pytest.mark.parametrize("size", SIZES)
def test_features_of_g(size: str, tmp_path: Path) -> None:
    assert_passes(features(tmp_path / "case", config(**SIZES[size]), "G", seed=1))


@pytest.mark.parametrize("size", ["frequency 3 of 7", "frequency 9 of 5"])
def test_language_model(size: str, tmp_path: Path) -> None:
    assert_passes(language(tmp_path / "case", config(**SIZES[size]), seed=2))


def test_features_of_c(tmp_path: Path) -> None:
    assert_passes(features(tmp_path / "case", config(clip_embed_dim=5), "C", seed=3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_tower(bias: bool, norm: bool, tmp_path: Path) -> None:
    sizes = {
        "vision_config__qkv_bias": bias,
        "vision_config__qk_normalization": norm,
        "vision_config__layer_norm_eps": 1e-3,
    }
    assert_passes(tower(tmp_path / "case", config(**sizes), seed=4))


@pytest.mark.parametrize("variant", ["stage2", "retrieval"])
def test_losses(variant: str, tmp_path: Path) -> None:
    cfg = config(**SIZES["frequency 3 of 7"])
    assert_passes(losses(tmp_path / "case", cfg, variant, seed=5))
