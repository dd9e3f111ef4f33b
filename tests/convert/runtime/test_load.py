"""A folder is read strictly: what is wrong with it is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")

from internvl_jax.convert.runtime.config import FolderError, VitConfig, read  # noqa: E402
from internvl_jax.convert.runtime.load import INDEX, load  # noqa: E402
from internvl_jax.models.internvl import InternVLConfig  # noqa: E402
from tests.convert.runtime.conftest import QLLAMA, VIT, Pair  # noqa: E402


@pytest.fixture(scope="module")
def pair(exported: Callable) -> Pair:
    return exported(VIT)


@pytest.fixture
def folder(pair: Pair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair.folder, tmp_path / "model"))


def refused(folder: Path, **options: str) -> str:
    with pytest.raises(FolderError) as error:
        load(folder, device="cpu", **options)
    said = str(error.value)
    assert "\n" not in said and said.endswith(".")
    return said


def shard(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    path = folder / "model-1.safetensors"
    tensors = {name: np.array(x) for name, x in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_the_config_says_what_we_built(pair: Pair) -> None:
    config = read(pair.folder)
    assert config.name == "model" and config.image is not None and config.image.size == 28
    assert isinstance(config.model, VitConfig)
    for field in ("image_size", "patch_size", "width", "depth", "norm", "qk_norm", "eps"):
        assert getattr(config.model, field) == getattr(pair.cfg, field)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_tensor_is_there_in_the_dtype(dtype: str, folder: Path) -> None:
    _, model = load(folder, device="cpu", dtype=dtype)
    for tensor in model.state_dict().values():
        assert tensor.dtype == getattr(torch, dtype) and tensor.device.type == "cpu"
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_the_temperature_is_not_rounded(exported: Callable) -> None:
    cfg = InternVLConfig(VIT, QLLAMA, queries=2, embed_dim=8, pool_heads=2)
    pair = exported(cfg)
    scale = pair.theirs(dtype="bfloat16").logit_scale
    assert scale.dtype == torch.float32
    assert float(scale) == float(pair.ours.logit_scale[...])


def test_missing_extra_and_misshapen_tensors_are_named(folder: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        names = sorted(tensors)
        del tensors[names[0]]
        tensors[names[1]] = tensors[names[1]][..., :3]
        tensors["surplus"] = np.zeros(3)

    names = sorted(load_file(folder / "model-1.safetensors"))
    shard(folder, change)
    said = refused(folder)
    assert f"lacks {names[0]}" in said and "has the unknown surplus" in said
    assert f"misshapes {names[1]} (is [" in said and "should be [" in said


def test_a_tensor_twice(folder: Path) -> None:
    name = next(iter(load_file(folder / "model-2.safetensors")))
    shard(folder, lambda tensors: tensors.update({name: np.zeros(1)}))
    assert f"the tensor {name} twice" in refused(folder)


def test_damaged_files(folder: Path) -> None:
    path = folder / "model-1.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:100], b"", b"\xff" * 200, whole[:-8]):
        path.write_bytes(damaged)
        assert "not a readable safetensors file" in refused(folder)
    path.unlink()
    assert "lacks model-1.safetensors" in refused(folder)
    (folder / INDEX).write_text("{}")
    assert f"{INDEX} is damaged" in refused(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "is no file name" in refused(folder)
    (folder / INDEX).unlink()
    (folder / "model-2.safetensors").unlink()
    assert "holds no .safetensors file" in refused(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "not of the format internvl_jax.plain"),
        ({"version": 2}, "not of the format internvl_jax.plain, version 1"),
        ({"kind": "gan"}, "kind='gan'"),
        ({"model": None}, "is None, not a table"),
        ({"model": {"width": 3}}, "config: model lacks depth"),
        ({"surplus": 1}, "has the unknown surplus"),
        ({"image": {"size": "big", "resize": "pad", "mean": [], "std": []}}, "'big', which is no"),
        ({"image": {"size": 8, "resize": "fold", "mean": [], "std": []}}, "resize='fold'"),
    ],
)
def test_a_config_that_cannot_be(change: dict, said: str, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert said.replace("config: model", "model") in refused(folder)


def test_a_model_that_cannot_be(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model"]["mlp_dim"] = -3
    (folder / "config.json").write_text(json.dumps(config))
    assert "describes no model" in refused(folder)


def test_no_config_at_all(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "is not JSON" in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "is not of the format" in refused(folder)
    assert "There is no" in refused(folder / "nowhere")


def test_an_unknown_dtype(folder: Path) -> None:
    assert "'int3' is unknown" in refused(folder, dtype="int3")
