"""Official folders out: exact, sharded, all or nothing; from parameters and from checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open

from internvl_jax.checkpoint import Checkpoints, iter_leaves
from internvl_jax.convert import to_torch
from internvl_jax.convert.__main__ import main
from internvl_jax.convert.architectures import model_config
from internvl_jax.convert.from_torch import Tensors, WeightsError, load
from internvl_jax.convert.key_maps import key_map
from internvl_jax.convert.to_torch import export
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.stages.contrastive import ContrastiveStage
from internvl_jax.stages.generative import GenerativeStage
from internvl_jax.stages.language import LanguageStage
from internvl_jax.stages.registry import stage_to_config
from internvl_jax.stages.stage import Stage
from internvl_jax.tree import flatten, unflatten

VIT = VitConfig(image_size=14, patch_size=7, width=8, depth=2, heads=2, mlp_dim=9)
TEXT = LlamaConfig(
    vocab_size=13, width=12, depth=5, heads=3, mlp_dim=7, cross_frequency=2, pad_id=0
)
C = InternVLConfig(VIT, TEXT, 0, 5, 4)
G = InternVLConfig(VIT, dataclasses.replace(TEXT, vision_width=8), 3, 5, 4)


def parameters(cfg: Any, naming: str = "hf") -> dict[str, np.ndarray]:
    """Random parameters by path."""
    rng = np.random.default_rng(0)
    ours = key_map(cfg, naming).ours
    return {p: np.asarray(rng.standard_normal(x.shape), np.float32) for p, x in ours.items()}


def read_back(folder: Path, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    cfg, naming = model_config(json.loads((folder / "config.json").read_text()))
    return flatten(load(folder, cfg, naming, dtype=dtype))


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


@pytest.mark.parametrize("cfg", [C, G, VIT], ids=["stage 1", "stage 2", "tower"])
def test_import_of_export_is_the_identity(cfg: Any, tmp_path: Path) -> None:
    params = parameters(cfg)
    assert export(unflatten(params), cfg, tmp_path / "out") == ()
    assert_same(read_back(tmp_path / "out"), params)


def test_the_plain_naming_leaves_the_head_out(tmp_path: Path) -> None:
    params = parameters(C)
    assert export(params, C, tmp_path / "out", format="stage1") == ("qllama/lm_head",)
    names = set(Tensors(tmp_path / "out"))
    assert "transformer.layers.4.mlp.up_proj.weight" in names and "blocks.1.ls2.gamma" in names
    cfg, naming = model_config(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert naming == "plain"
    again = load(tmp_path / "out", cfg, naming)
    np.testing.assert_array_equal(flatten(again)["vision/pos"], params["vision/pos"])


def test_shards_index_and_headers(tmp_path: Path) -> None:
    params = parameters(G)
    export(params, G, tmp_path / "out", shard_bytes=3000, metadata={"step": "7"})
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = sum(x.nbytes for x in params.values())
    assert index["metadata"]["total_size"] == total
    held = {}
    for file in files:
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt", "step": "7"}
            held |= dict.fromkeys(opened.keys(), file.name)
            sizes = [int(np.prod(opened.get_slice(n).get_shape())) * 4 for n in opened.keys()]  # noqa: SIM118
            assert sum(sizes) <= 3000 or len(sizes) == 1
    assert index["weight_map"] == held


@pytest.mark.parametrize(
    ("dtype", "stored"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)]
)
def test_narrower_dtypes_round_once(dtype: str, stored: Any, tmp_path: Path) -> None:
    params = parameters(C)
    export(params, C, tmp_path / "out", dtype=dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    rounded = {p: x.astype(stored) if x.ndim else x for p, x in params.items()}
    assert_same(read_back(tmp_path / "out", None), rounded)


def test_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    params = parameters(G)
    params["surplus"] = params.pop("itm_bias")
    params["query_tokens"] = params["query_tokens"][:2]
    with pytest.raises(WeightsError) as caught:
        export(params, G, tmp_path / "out")
    assert str(caught.value) == (
        "The parameters do not fit the model: they lack itm_bias; they have the unknown surplus; "
        "they misshape query_tokens."
    )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_asked(tmp_path: Path) -> None:
    params = parameters(C)
    export(params, C, tmp_path / "out")
    before = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    with pytest.raises(WeightsError, match="exists: choose another folder"):
        export(parameters(G), G, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == before
    export(parameters(G), G, tmp_path / "out", overwrite=True)
    assert_same(read_back(tmp_path / "out"), parameters(G))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_an_export_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = GenerativeStage(model=G, text_length=8, image_size=14)
    checkpoint(tmp_path / "run", stage, parameters(G))
    arguments = ["export", str(tmp_path / "run")]
    for folder in ("run", "run/checkpoints", "."):
        assert main([*arguments, str(tmp_path / folder), "--overwrite"]) == 78
        assert "is no export" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "out")]) == 0


def test_what_a_killed_export_left_goes(tmp_path: Path) -> None:
    stage = GenerativeStage(model=G, text_length=8, image_size=14)
    checkpoint(tmp_path / "run", stage, parameters(G))
    for name in (".out.scratch-abc", ".out.unfinished-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"half")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_no_average_is_no_silent_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = GenerativeStage(model=G, text_length=8, image_size=14)
    with Checkpoints(str(tmp_path / "run")) as manager:
        state = {"params": unflatten(parameters(G))}
        manager.save(3, state, {"stage": stage_to_config(stage)})
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--ema"]) == 78
    assert "keeps no averaged parameters" in capsys.readouterr().err


def test_the_config_names_the_type_of_the_arrays(tmp_path: Path) -> None:
    params = {p: x.astype(ml_dtypes.bfloat16) if x.ndim else x for p, x in parameters(G).items()}
    export(params, G, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_export_leaves_nothing_half(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(C)
    if overwrite:
        export(params, C, tmp_path / "out")
    calls = []

    def stop(*args: Any, **kwargs: Any) -> str:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return save(*args, **kwargs)

    save = to_torch.write
    monkeypatch.setattr(to_torch, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        export(parameters(G), G, tmp_path / "out", shard_bytes=1000, overwrite=overwrite)
    left = [p.name for p in tmp_path.iterdir()]
    assert left == (["out"] if overwrite else [])
    if overwrite:
        assert_same(read_back(tmp_path / "out"), params)


def checkpoint(folder: Path, stage: Stage, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Saves a run's state as the train loop does; returns the averaged parameters."""
    trained = {p: x for p, x in params.items() if stage.trainable(p)}
    frozen = {p: x for p, x in params.items() if not stage.trainable(p)}
    ema = {p: np.asarray(x + 1) for p, x in trained.items()}
    state = {
        "params": unflatten(trained),
        "ema": unflatten(ema),
        "frozen": unflatten(frozen),
        "opt": {"count": np.array(3, np.int32)},
    }
    manager = Checkpoints(str(folder))
    manager.save(3, state, {"stage": stage_to_config(stage)})
    manager.close()
    return {**frozen, **ema}


@pytest.mark.parametrize(
    "stage",
    [
        GenerativeStage(model=G, text_length=8, image_size=14),
        ContrastiveStage(model=C, text_length=8, image_size=14),
    ],
    ids=["stage 2", "stage 1"],
)
def test_a_checkpoint_is_exported_by_the_command(
    stage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = parameters(stage.model)
    averaged = checkpoint(tmp_path / "run", stage, params)
    out, ema = tmp_path / "out", tmp_path / "ema"
    assert main(["export", str(tmp_path / "run"), str(out), "--shard-size", "2KB"]) == 0
    assert_same(read_back(out), params)
    with safe_open(next(out.glob("*.safetensors")), "np") as opened:
        header = opened.metadata()
    assert header["stage"] == stage.name and header["step"] == "3"

    assert main(["export", str(tmp_path / "run"), str(ema), "--ema"]) == 0
    assert_same(read_back(ema), averaged)

    assert main(["export", str(tmp_path / "run"), str(out)]) == 78
    said = capsys.readouterr().err
    assert "exists" in said and said.count("\n") == 1


def test_the_command_names_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = ContrastiveStage(model=C, text_length=8, image_size=14)
    checkpoint(tmp_path / "run", stage, parameters(C))
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), str(out), "--format", "stage1"]) == 0
    assert "qllama/lm_head has no name in this format" in capsys.readouterr().out


def test_the_command_refuses_what_it_cannot_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 78
    assert "nowhere" in capsys.readouterr().err
    stage = LanguageStage(model=LlamaConfig(13, 12, 1, 3, mlp_dim=7), text_length=8)
    checkpoint(tmp_path / "run", stage, {"llm/norm/scale": np.ones(12, np.float32)})
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 78
    assert "they lack embedding, lm_head" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["5XB", "GB", "0MB", "1.5GB"])
def test_shard_sizes_are_read_strictly(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "a", "b", "--shard-size", size])
    assert "write for example 5GB" in capsys.readouterr().err


def test_leaves_that_are_not_stored_by_layers_are_laid_down_first(tmp_path: Path) -> None:
    """Foreign checkpoints: here Orbax' own layout, with all layers in each of four chunks."""
    params = parameters(G)
    mesh = jax.make_mesh((4,), ("d",), devices=jax.devices()[:4])

    def spread(x: np.ndarray) -> jax.Array:
        axis = next((i for i in range(1, x.ndim) if x.shape[i] % 4 == 0), None)
        spec = [None] * x.ndim
        if axis is not None:
            spec[axis] = "d"
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    manager = Checkpoints(str(tmp_path / "run"), stacked=lambda path: False)
    state = {"params": unflatten({p: spread(x) for p, x in params.items()})}
    stage = GenerativeStage(model=G, text_length=8, image_size=14)
    manager.save(3, state, {"stage": stage_to_config(stage)})
    manager.close()
    foreign = [leaf for leaf in iter_leaves(tmp_path / "run") if not leaf.by_rows]
    assert len(foreign) > 10
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert_same(read_back(tmp_path / "out"), params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_a_flipped_bit_stops_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Large enough for the values to lie in the file as they are.
    large = dataclasses.replace(G, vision=dataclasses.replace(VIT, mlp_dim=400))
    params = parameters(large)
    stage = GenerativeStage(model=large, text_length=8, image_size=14)
    checkpoint(tmp_path / "run", stage, params)
    needle = params["vision/blocks/layers/mlp/fc1"][1, 3].tobytes()
    hit = 0
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file() and needle in (content := file.read_bytes()):
            at = content.index(needle) + 9
            file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            hit += 1
    assert hit
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 78
    assert "vision/blocks/layers/mlp/fc1" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_file_that_was_cut_off_stops_the_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = dataclasses.replace(G, vision=dataclasses.replace(VIT, mlp_dim=400))
    stage = GenerativeStage(model=large, text_length=8, image_size=14)
    checkpoint(tmp_path / "run", stage, parameters(large))
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.parent.name == "d"]
    with max(files, key=lambda p: p.stat().st_size).open("r+b") as file:
        file.truncate(50)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 78
    assert "can't be read" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    export(parameters(G), G, tmp_path / "out", shard_bytes=2000)
    listed = (tmp_path / "out" / "checksums.sha256").read_text().splitlines()
    assert len(listed) == len(list((tmp_path / "out").iterdir())) - 1 > 4
    for line in listed:
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
