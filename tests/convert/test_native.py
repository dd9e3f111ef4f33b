"""transformers' own vision tower agrees with ours on exported weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from internvl_jax.convert.key_maps import key_map
from internvl_jax.convert.native import available
from internvl_jax.convert.to_torch import export
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.llama import LlamaConfig

pytestmark = pytest.mark.skipif(not available(), reason="torch and transformers are extras")

SIX_B = VitConfig(image_size=28, patch_size=7, width=40, depth=3, heads=5, mlp_dim=70)
SMALL = VitConfig(28, 7, 40, 3, 4, 70, norm="layer", qk_norm=False, qkv_bias=True)


def parameters(cfg: VitConfig | InternVLConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        path: np.asarray(0.3 * rng.standard_normal(leaf.shape) + ("scale" in path), np.float32)
        for path, leaf in key_map(cfg, "hf").ours.items()
    }


@pytest.mark.parametrize("cfg", [SIX_B, SMALL], ids=["6B options", "300M options"])
@pytest.mark.parametrize("whole", [False, True], ids=["tower", "InternVL-C"])
def test_last_hidden_states_agree(cfg: VitConfig, whole: bool, tmp_path: Path) -> None:
    from internvl_jax.convert.native import check_vision_with_transformers

    text = LlamaConfig(vocab_size=13, width=12, depth=2, heads=3, mlp_dim=7, pad_id=0)
    model = InternVLConfig(cfg, text, 0, 5, 4) if whole else cfg
    params = parameters(model)
    export(params, model, tmp_path / "out")
    images = np.random.default_rng(1).standard_normal((2, 28, 28, 3)).astype(np.float32)
    assert check_vision_with_transformers(tmp_path / "out", images) < 1e-4
