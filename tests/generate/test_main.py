"""The command line, on checkpoints of untrained models: what it prints, and how it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from data_pipelines.image import decode, encode_png, resize_square
from data_pipelines.text import Tokenizer, train
from internvl_jax import pretrained
from internvl_jax.checkpoint import Checkpoints
from internvl_jax.generate.__main__ import main
from internvl_jax.generate.prompt import caption, left_pad
from internvl_jax.generate.settings import Settings
from internvl_jax.models.compute import Compute
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.stages.contrastive import ContrastiveStage
from internvl_jax.stages.finetune import FinetuneStage
from internvl_jax.stages.generative import GenerativeStage
from internvl_jax.stages.registry import stage_to_config
from internvl_jax.stages.stage import Stage

VIT = VitConfig(image_size=28, width=16, depth=1, heads=2, mlp_dim=24)
SIZES = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 20}
RUN = {"compute": Compute(dtype="float32", remat="none"), "image_size": 28}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["English caption:", "a red apple", "What is this?", "USER: ASSISTANT:"]
    return train(texts, tmp_path_factory.mktemp("text") / "tokenizer.model", vocab_size=300)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / "a.png", folder / "b.png"]
    for path in paths:
        path.write_bytes(encode_png(rng.integers(0, 256, (30, 40, 3), np.uint8)))
    return paths


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, drawn):
    """Saves a drawn model of a stage as a run does; returns the folder and the model."""

    def save(stage: Stage) -> tuple[str, Any]:
        workdir = str(tmp_path_factory.mktemp(stage.name))
        model, state = drawn(stage.build, 5), {}
        for keys, variable in nnx.to_flat_state(nnx.state(model)):
            path = "/".join(map(str, keys))
            state[f"{'params' if stage.trainable(path) else 'frozen'}/{path}"] = variable[...]
        checkpoints = Checkpoints(workdir, async_=False)
        checkpoints.save(7, state, {"stage": stage_to_config(stage)})
        checkpoints.close()
        return workdir, model

    return save


@pytest.fixture(scope="module")
def captioner(saved, tokenizer: Tokenizer) -> tuple[str, Any]:
    text = LlamaConfig(tokenizer.vocab_size, **SIZES, cross_frequency=2, vision_width=16)
    model = InternVLConfig(vision=VIT, qllama=text, queries=3, embed_dim=8, pool_heads=2)
    return saved(GenerativeStage(model=model, **RUN))


def test_captions(
    captioner: tuple[str, Any],
    tokenizer: Tokenizer,
    pictures: list[Path],
    capsys: pytest.CaptureFixture[str],
):
    workdir, model = captioner
    _, loaded, _ = pretrained.load(workdir)
    for ours, theirs in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(loaded))):
        np.testing.assert_array_equal(ours, theirs)
    options = ["--checkpoint", workdir, "--tokenizer", str(tokenizer.path), "--image"]
    options += [*map(str, pictures), "--beams", "2", "--max-new-tokens", "4"]
    assert main(options) == 0
    printed = capsys.readouterr().out.splitlines()

    images = np.stack([resize_square(decode(path.read_bytes()), 28, "exact") for path in pictures])
    row = [1, *tokenizer.ids("English caption:")]
    ids, mask = left_pad([row, row])
    new = caption(loaded, images, ids, mask, Settings(max_new_tokens=4, num_beams=2))
    assert printed == [
        f"{path}\tEnglish caption:\t{tokenizer.decode(ids)}" for path, ids in zip(pictures, new)
    ]


def test_conversation(
    saved, tokenizer: Tokenizer, pictures: list[Path], capsys: pytest.CaptureFixture[str]
):
    llm = LlamaConfig(tokenizer.vocab_size, **SIZES)
    stage = FinetuneStage(
        model=ChatConfig(vision=VIT, llm=llm, projector="mlp1"), text_length=64, **RUN
    )
    workdir, _ = saved(stage)
    options = ["--checkpoint", workdir, "--tokenizer", str(tokenizer.path), "--image"]
    options += [*map(str, pictures), "--prompt", "What is this?", "--prompt", "a red apple?"]
    options += ["--max-new-tokens", "5", "--temperature", "0.8", "--top-k", "50", "--seed", "3"]
    assert main(options) == 0
    first = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in first] == ["USER", "ASSISTANT"] * 2
    assert first[2] == "USER: a red apple?"
    assert main(options) == 0
    assert capsys.readouterr().out.splitlines() == first
    options[-1] = "4"
    assert main(options) == 0
    assert capsys.readouterr().out.splitlines() != first


def test_what_cannot_be_used_is_said(
    captioner: tuple[str, Any],
    saved,
    tokenizer: Tokenizer,
    pictures: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    text = LlamaConfig(tokenizer.vocab_size, **SIZES)
    model = InternVLConfig(vision=VIT, qllama=text, queries=0, embed_dim=8, pool_heads=2)
    contrastive, _ = saved(ContrastiveStage(model=model, **RUN))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    image = ["--image", str(pictures[0])]
    for checkpoint, options, sentence in (
        (contrastive, image, "of the contrastive stage, whose model writes nothing"),
        (captioner[0], [], "give --image"),
        (captioner[0], ["--image", str(broken)], "broken.png"),
        (captioner[0], ["--image", str(tmp_path / "none.png")], "none.png"),
        (captioner[0], [*image, "--beams", "2", "--top-k", "3"], "do_sample with num_beams=2"),
        (captioner[0], [*image, "--step", "8"], "step 8"),
        (str(tmp_path), image, str(tmp_path)),
    ):
        status = main(["--checkpoint", checkpoint, "--tokenizer", str(tokenizer.path), *options])
        shown = capsys.readouterr()
        assert (status, shown.out) == (78, "")
        assert sentence in shown.err and shown.err.count("\n") == 1
