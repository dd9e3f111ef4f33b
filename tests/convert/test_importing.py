"""Official folders in: the same values bit for bit, in a checkpoint that everything starts from."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from internvl_jax import pretrained
from internvl_jax.checkpoint import CheckpointError, iter_leaves, read_tree
from internvl_jax.checkpoint.storage import find_step, load_meta
from internvl_jax.checkpoint.writer import StepWriter
from internvl_jax.convert import from_torch, importing
from internvl_jax.convert.__main__ import main
from internvl_jax.convert.from_torch import Tensors, WeightsError
from internvl_jax.convert.importing import import_weights
from internvl_jax.convert.key_maps import key_map
from internvl_jax.convert.to_torch import export, export_checkpoint
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.nn.embed import resize_positions
from internvl_jax.tree import flatten

VIT = VitConfig(image_size=14, patch_size=7, width=8, depth=3, heads=2, mlp_dim=9)
TEXT = LlamaConfig(
    vocab_size=13, width=12, depth=5, heads=3, mlp_dim=7, cross_frequency=2, pad_id=0
)
C = InternVLConfig(VIT, TEXT, 0, 5, 4)
G = InternVLConfig(VIT, dataclasses.replace(TEXT, vision_width=8), 3, 5, 4)
LLAMA = LlamaConfig(vocab_size=13, width=12, depth=5, heads=3, mlp_dim=7)


def parameters(cfg: Any, dtype: Any = np.float32, naming: str = "hf") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ours = key_map(cfg, naming).ours
    return {p: np.asarray(rng.standard_normal(x.shape)).astype(dtype) for p, x in ours.items()}


def llama_folder(folder: Path, cfg: LlamaConfig, params: dict[str, np.ndarray]) -> Path:
    """A decoder as Hugging Face writes it."""
    keys = key_map(cfg, "hf")
    folder.mkdir()
    tensors = {n: keys.to_official(params, n) for n in keys.entries}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.mlp_dim,
        "rms_norm_eps": cfg.eps,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"words")
    return folder


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        assert found[path].dtype == x.dtype, path
        np.testing.assert_array_equal(found[path], x, err_msg=path)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("cfg", [C, G, VIT], ids=["stage 1", "stage 2", "tower"])
def test_import_of_export_is_the_identity(cfg: Any, dtype: Any, tmp_path: Path) -> None:
    params = parameters(cfg, dtype)
    export(params, cfg, tmp_path / "out", shard_bytes=2000)
    import_weights(tmp_path / "out", tmp_path / "run")
    prefix = "params/vision" if cfg is VIT else "params"
    assert_same(flatten(read_tree(str(tmp_path / "run"), prefix=prefix)), params)
    export_checkpoint(tmp_path / "run", tmp_path / "again", shard_bytes=2000)
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        assert_same(load_file(tmp_path / "again" / file.name), load_file(file))


def test_orbax_itself_reads_what_was_imported(tmp_path: Path) -> None:
    params = parameters(G)
    export(params, G, tmp_path / "out")
    import_weights(tmp_path / "out", tmp_path / "run")
    with ocp.PyTreeCheckpointer() as orbax:
        state = orbax.restore(str(find_step(tmp_path / "run")) + "/state")
    assert_same(flatten(state["params"]), params)


def test_a_model_is_built_from_what_was_imported(tmp_path: Path) -> None:
    params = parameters(G)
    export(params, G, tmp_path / "out")
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "run")]) == 0
    stage, model, _ = pretrained.load(str(tmp_path / "run"), dtype="float32")
    assert stage.name == "generative" and stage.model.qllama == dataclasses.replace(
        G.qllama, kv_heads=3, head_dim=4
    )
    np.testing.assert_array_equal(np.asarray(model.query_tokens[...]), params["query_tokens"])


@pytest.mark.parametrize("part", ["llm", "qllama"])
def test_a_decoder_becomes_the_part_that_it_is_wanted_for(part: str, tmp_path: Path) -> None:
    params = parameters(LLAMA)
    source = llama_folder(tmp_path / "llama", LLAMA, params)
    assert main(["import", str(source), str(tmp_path / "run"), "--as", part]) == 0
    found = flatten(read_tree(str(tmp_path / "run"), prefix=f"params/{part}"))
    if part == "llm":
        assert_same(found, params)
    else:  # the text tower of stage 1: layers 0, 2 and 1, 3 in pairs, 4 alone
        wanted = key_map(C, "hf").ours
        assert {f"qllama/{p}" for p in found} == {p for p in wanted if p.startswith("qllama/")}
        up = params["periods/layers/first/mlp/up"]
        np.testing.assert_array_equal(found["periods/layers/first/mlp/up"], up[[0, 2]])
        np.testing.assert_array_equal(found["periods/layers/rest/0/mlp/up"], up[[1, 3]])
        np.testing.assert_array_equal(found["tail/first/mlp/up"], up[4])
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == b"words"


def test_a_tower_is_no_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(parameters(VIT), VIT, tmp_path / "out")
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "run"), "--as", "llm"]) == 78
    assert "one that can be vision: it cannot be imported as 'llm'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_position_table_is_resized_on_the_way(tmp_path: Path) -> None:
    params = parameters(VIT)
    export(params, VIT, tmp_path / "out")
    import_weights(tmp_path / "out", tmp_path / "run", image_size=28)
    found = flatten(read_tree(str(tmp_path / "run"), prefix="params/vision"))
    expected = np.asarray(resize_positions(jnp.asarray(params.pop("pos")), (4, 4)))
    np.testing.assert_allclose(found.pop("pos"), expected, atol=1e-6)
    assert_same(found, params)
    meta = load_meta(find_step(tmp_path / "run"))
    assert meta.user["part"]["model"]["image_size"] == 28


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    large = dataclasses.replace(VIT, mlp_dim=4000)
    export(parameters(large), large, tmp_path / "out")
    code = """
import resource, signal, sys
from internvl_jax.convert.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.exit(main(["import", "out", "run"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 78
    assert done.stderr.startswith("leaf params/vision/") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_no_device_is_touched(tmp_path: Path) -> None:
    """A chip belongs to whoever trains on it; asking JAX for any would fail here."""
    export(parameters(G), G, tmp_path / "out")
    code = """
import sys
from internvl_jax.convert.__main__ import main
assert main(["import", "out", "run", "--image-size", "28", "--vocab-size", "16"]) == 0
assert main(["export", "run", "again", "--format", "plain"]) == 0
"""
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "none", "PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
    )


def test_new_words_are_the_mean_of_the_old_ones(tmp_path: Path) -> None:
    params = parameters(LLAMA)
    source = llama_folder(tmp_path / "llama", LLAMA, params)
    import_weights(source, tmp_path / "run", vocab_size=16)
    found = flatten(read_tree(str(tmp_path / "run"), prefix="params/llm"))
    for path, axis in (("embedding", 0), ("lm_head", 1)):
        table = np.moveaxis(found[path], axis, 0)
        old = np.moveaxis(params[path], axis, 0)
        assert table.shape == (16, 12)
        np.testing.assert_array_equal(table[:13], old)
        np.testing.assert_allclose(table[13:], np.tile(old.mean(0), (3, 1)), rtol=1e-6)
    with pytest.raises(WeightsError, match="13 entries already: --vocab-size 12 would cut it"):
        import_weights(source, tmp_path / "other", vocab_size=12)


def test_strange_names_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    export(parameters(VIT), VIT, tmp_path / "out")
    file = tmp_path / "out" / "model-00001-of-00001.safetensors"
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    tensors = load_file(file)
    tensors["surplus"] = tensors.pop("encoder.layers.1.ls1")
    save_file(tensors, file)
    with pytest.raises(WeightsError) as caught:
        import_weights(tmp_path / "out", tmp_path / "run")
    assert str(caught.value).endswith(
        "does not fit the model: it lacks encoder.layers.1.ls1; it has the unknown surplus."
    )
    assert not (tmp_path / "run").exists()


def test_what_is_there_is_kept_unless_asked(tmp_path: Path) -> None:
    params = parameters(VIT)
    export(params, VIT, tmp_path / "out")
    import_weights(tmp_path / "out", tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a checkpoint of step 0"):
        import_weights(tmp_path / "out", tmp_path / "run", dtype="bfloat16")
    import_weights(tmp_path / "out", tmp_path / "run", dtype="bfloat16", overwrite=True)
    found = flatten(read_tree(str(tmp_path / "run"), prefix="params/vision"))
    assert_same(found, {p: x.astype(ml_dtypes.bfloat16) for p, x in params.items()})


def test_what_is_replaced_stays_until_the_new_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(VIT)
    export(params, VIT, tmp_path / "out")
    import_weights(tmp_path / "out", tmp_path / "run")

    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(importing.StepWriter, "leaf", full)
    with pytest.raises(OSError, match="No space"):
        import_weights(tmp_path / "out", tmp_path / "run", overwrite=True)
    assert_same(flatten(read_tree(str(tmp_path / "run"), prefix="params/vision")), params)
    monkeypatch.undo()
    import_weights(tmp_path / "out", tmp_path / "run", dtype="bfloat16", overwrite=True)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]


def test_scalars_stay_float32(tmp_path: Path) -> None:
    params = parameters(C)
    export(params, C, tmp_path / "out")
    import_weights(tmp_path / "out", tmp_path / "run", dtype="bfloat16")
    found = flatten(read_tree(str(tmp_path / "run"), prefix="params"))
    assert found["logit_scale"].dtype == np.float32
    assert found["logit_scale"] == params["logit_scale"]
    assert found["vision/pos"].dtype == ml_dtypes.bfloat16


def test_what_no_checkpoint_can_hold_needs_a_word(tmp_path: Path) -> None:
    export(parameters(VIT), VIT, tmp_path / "out")
    file = tmp_path / "out" / "model-00001-of-00001.safetensors"
    save_file({n: x.astype(np.float64) for n, x in load_file(file).items()}, file)
    with pytest.raises(WeightsError, match="is float64, which parameters cannot be"):
        import_weights(tmp_path / "out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    import_weights(tmp_path / "out", tmp_path / "run", dtype="float32")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_pickled_parameters_of_any_age(
    old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(from_torch, "MAPPED", 100)  # mapped anew many times
    params = parameters(VIT)
    export(params, VIT, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    state = {n: torch.nn.Parameter(torch.from_numpy(x)) for n, x in load_file(file).items()}
    file.unlink()
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    path = tmp_path / "out" / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    import_weights(tmp_path / "out", tmp_path / "run")
    assert_same(flatten(read_tree(str(tmp_path / "run"), prefix="params/vision")), params)


def test_the_tokenizer_comes_with_all_that_belongs_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = llama_folder(tmp_path / "llama", LLAMA, parameters(LLAMA))
    (source / "added_tokens.json").write_text('{"<IMG_CONTEXT>": 12}')
    (source / "tokenizer_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    import_weights("llama", "run")
    named = load_meta(find_step(tmp_path / "run")).user["experiment"]["data"]["tokenizer"]
    assert named == str(tmp_path / "run" / "tokenizer.model")
    assert (tmp_path / "run" / "added_tokens.json").read_text() == '{"<IMG_CONTEXT>": 12}'
    (source / "tokenizer.model").unlink()  # what is left is no tokenizer
    import_weights("llama", "other")
    assert load_meta(find_step(tmp_path / "other")).user["experiment"]["data"] == {}


def test_a_part_alone_is_no_model_to_run(tmp_path: Path) -> None:
    export(parameters(VIT), VIT, tmp_path / "out")
    import_weights(tmp_path / "out", tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a model's vision alone"):
        pretrained.load(str(tmp_path / "run"))


def test_a_head_that_is_tied_must_be_the_embedding(tmp_path: Path) -> None:
    llm = dataclasses.replace(LLAMA, tied_head=True)
    vision = VitConfig(image_size=28, patch_size=7, width=8, depth=3, heads=2, mlp_dim=9)
    cfg = ChatConfig(vision=vision, llm=llm, projector="mlp1", unshuffle="v2")
    params = parameters(cfg, naming="remote")
    export(params, cfg, tmp_path / "out", format="remote-code")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["llm_config"]["tie_word_embeddings"] = True
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    import_weights(tmp_path / "out", tmp_path / "run")
    assert_same(flatten(read_tree(str(tmp_path / "run"), prefix="params")), params)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    tensors["language_model.lm_head.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(WeightsError, match="differ, although its config ties them"):
        import_weights(tmp_path / "out", tmp_path / "other")


def test_an_interrupted_import_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(parameters(VIT), VIT, tmp_path / "out")
    write, calls = StepWriter.leaf, []

    def stop(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(importing.StepWriter, "leaf", stop)
    with pytest.raises(KeyboardInterrupt):
        import_weights(tmp_path / "out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    import_weights(tmp_path / "out", tmp_path / "run")  # and it starts over
    assert len(list(iter_leaves(str(tmp_path / "run")))) == len(parameters(VIT))


def test_an_unfinished_step_is_no_checkpoint_and_is_replaced(tmp_path: Path) -> None:
    writer = StepWriter(tmp_path / "run")
    writer.leaf("params/x", (2,), np.float32, [np.ones(2, np.float32)])
    with pytest.raises(CheckpointError):  # as a killed import leaves it
        find_step(tmp_path / "run")
    again = StepWriter(tmp_path / "run")
    again.leaf("params/y", (), np.float32, [np.asarray(3, np.float32)])
    again.commit({})
    assert flatten(read_tree(str(tmp_path / "run"))) == {"params/y": 3.0}


def test_mixed_types_need_a_word(tmp_path: Path) -> None:
    export(parameters(VIT), VIT, tmp_path / "out")
    file = tmp_path / "out" / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    name = "encoder.layers.2.mlp.fc1.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, file)
    with pytest.raises(WeightsError, match="is float16 where its neighbours are float32"):
        import_weights(tmp_path / "out", tmp_path / "run")
    import_weights(tmp_path / "out", tmp_path / "run", dtype="float32")


def test_an_index_cannot_point_outside_of_its_folder(tmp_path: Path) -> None:
    export(parameters(VIT), VIT, tmp_path / "out")
    save_file({"secret": np.ones(1)}, tmp_path / "model.safetensors")
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"secret": "../model.safetensors"}}))
    with pytest.raises(WeightsError, match=r"lacks model\.safetensors, which"):
        Tensors(tmp_path / "out")


def test_training_starts_from_it_on_a_mesh(tmp_path: Path) -> None:
    """Sharded reading of what one process wrote row by row."""
    from internvl_jax.checkpoint import CheckpointSource, Transfer
    from internvl_jax.checkpoint.transfer import load
    from internvl_jax.models.definition import Definition
    from internvl_jax.sharding.mesh import MeshConfig, make_mesh
    from internvl_jax.stages.generative import GenerativeStage

    params = parameters(G, ml_dtypes.bfloat16)
    export(params, G, tmp_path / "out")
    import_weights(tmp_path / "out", tmp_path / "run")
    stage = GenerativeStage(model=G, text_length=8, image_size=14)
    definition = Definition.of(stage.build, stage.trainable)
    mesh = make_mesh(MeshConfig(2, 4, 1))
    trained, frozen = definition.abstract(mesh, "bfloat16")
    target = {**flatten(trained), **flatten(frozen)}
    arrays, report = load(target, Transfer(CheckpointSource(tmp_path / "run"), cast=True))
    assert not report.new and not report.dropped
    for path, x in arrays.items():
        assert x.sharding == target[path].sharding and x.dtype == target[path].dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), params[path].astype(np.float32))
    assert jax.device_count() > 1


def test_the_template_of_a_dialogue_model_travels_or_is_missed_by_name(tmp_path: Path) -> None:
    """An imported InternVLChatModel speaks a template that is not rendered here."""
    vision = dataclasses.replace(VIT, image_size=28)
    cfg = ChatConfig(vision=vision, llm=LLAMA, projector="mlp1")
    export(parameters(cfg, naming="remote"), cfg, tmp_path / "out", format="remote-code")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "template": "internvl2_5"}))
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "run")]) == 0
    native = ["--format", "hf-native"]
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "native"), *native]) == 0
    assert not (tmp_path / "native" / "chat_template.jinja").exists()
    assert "the dialogue template 'internvl2_5'" in (tmp_path / "native" / "README.md").read_text()
