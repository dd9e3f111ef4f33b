"""The full-size configs are the paper's recipes (arXiv 2312.14238, Tables 20 and 21, 3.3)."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from internvl_jax.models import presets
from internvl_jax.train.experiment import Experiment, resolve


def experiment(name: str, argument: str = "") -> Experiment:
    return resolve(importlib.import_module(f"configs.{name}").get_config(argument))


def test_stage_1():
    run = experiment("stage1_contrastive")
    assert run.train.steps == 175_000 and run.train.global_batch == 163_840
    samples = run.train.steps * run.train.global_batch
    assert abs(samples / 28.7e9 - 1) < 0.01
    assert run.optim.warmup == 5000 and run.optim.schedule == "cosine"
    assert (run.optim.b1, run.optim.b2, run.optim.weight_decay) == (0.9, 0.95, 0.1)
    rate = lambda path: run.optim.peak_lr * run.stage.lr_scale(path, ())
    assert rate("vision/blocks/layers/attn/qkv") == pytest.approx(1e-3)
    assert rate("qllama/periods/layers/first/attn/q") == pytest.approx(1e-4)
    vision = dataclasses.replace(presets.internvit_6b_224(), drop_path=0.2)
    assert vision.drop_path_mode == "uniform"
    assert run.stage.model == dataclasses.replace(presets.internvl_c_13b_224(), vision=vision)


def test_stage_1_ends_unmasked_at_224():
    run = experiment("stage1_contrastive")
    (first_end, first), (end, second) = run.schedule()
    assert (first.image_size, first.keep, first.kept) == (196, 0.5, 98)
    assert (second.image_size, second.keep, second.kept) == (224, 1.0, None)
    assert end == run.train.steps
    assert abs((end - first_end) * run.train.global_batch / 0.5e9 - 1) < 0.01
    assert first.model == second.model  # one position table


def test_stage_2():
    run = experiment("stage2_generative")
    assert run.train.steps == 80_000 and run.train.global_batch == 20_480
    assert abs(run.train.steps * run.train.global_batch / 1.6e9 - 1) < 0.03
    assert (run.optim.peak_lr, run.optim.warmup) == (5e-5, 2000)
    assert (run.optim.b1, run.optim.b2, run.optim.weight_decay) == (0.9, 0.98, 0.05)
    assert run.stage.model == presets.internvl_14b_224()
    assert run.stage.image_size == 224 and run.stage.model.vision.drop_path == 0


def test_retrieval_fine_tuning():
    run = experiment("stage2_generative", "retrieval")
    assert (run.optim.peak_lr, run.optim.warmup, run.train.global_batch) == (1e-6, 100, 1024)
    assert (run.optim.b2, run.optim.weight_decay, run.stage.layer_decay) == (0.999, 0.05, 0.9)
    vision = run.stage.model.vision
    assert (run.stage.image_size, vision.image_size) == (364, 364)
    assert vision.drop_path_rates()[[0, -1]] == pytest.approx([0, 0.3])
    assert run.stage.trainable("vision/patch/kernel")
    assert run.stage.trainable("qllama/embedding")
    assert not run.stage.trainable("qllama/lm_head")  # which its loss does not reach


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_stage_3_without_qllama_is_llavas_recipe(size):
    first = experiment("stage3_finetune", f"mlp,{size}")
    assert (first.optim.peak_lr, first.train.global_batch) == (1e-3, 256)
    assert first.data["template"] == "plain"
    assert first.stage.trainable("projector/fc1") and not first.stage.trainable("llm/embedding")
    second = experiment("stage3_finetune", f"sft,{size}")
    assert (second.optim.peak_lr, second.train.global_batch) == (2e-5, 128)
    assert second.data["template"] == "vicuna_v1"
    assert second.stage.trainable("llm/lm_head")
    llm = {"7b": presets.vicuna_7b(), "13b": presets.vicuna_13b()}[size]
    for run in (first, second):
        assert (run.optim.warmup, run.optim.weight_decay) == (0.03, 0)
        assert run.stage.text_length == 2048 and run.stage.model.select_layer == -4
        assert run.stage.model == presets.chat_vit_vicuna(llm)
        assert not run.stage.trainable("vision/patch/kernel")


def test_stage_3_with_qllama():
    run = experiment("stage3_finetune", "mlp,qllama")
    assert run.train.global_batch == 512
    assert run.stage.model.qllama == presets.qllama_8b()
    # Table 9: 64 million trained parameters beside a 7B language model.
    trained = 63_455_232
    assert run.stage.model.visual_tokens(336) == 576 + 96
    total = run.stage.model.param_count()
    frozen = run.stage.model.vision.param_count() + run.stage.model.qllama.param_count()
    assert total - frozen - run.stage.model.llm.param_count() - 96 * 4096 == trained


def test_stage_3_of_two_billion_parameters():
    run = experiment("stage3_finetune", "2b")
    assert run.stage.model == presets.chat_2b()
    assert run.stage.image_size == 448 and run.stage.model.visual_tokens(448) == 256
    assert run.stage.model.param_count() == pytest.approx(2.1e9, rel=0.02)
    with pytest.raises(ValueError, match="leave one of them out"):
        experiment("stage3_finetune", "2b,qllama")


@pytest.mark.parametrize(
    ("name", "argument", "rates"),
    [
        ("stage2_generative", "lora", {"query_tokens": 1e-4, "itm_head": 1e-4}),
        ("stage2_generative", "retrieval,lora", {"clip_projector/q": 1e-4}),
        ("stage3_finetune", "lora", {"projector/fc1": 2e-5}),
        ("stage3_finetune", "mlp,qllama,lora", {"query_projector/fc1": 1e-3}),
    ],
)
def test_adapters_are_trained_and_the_towers_rest(name, argument, rates):
    run = experiment(name, argument)
    assert (run.train.frozen_dtype, run.train.frozen_in_checkpoints) == ("bfloat16", "linked")
    adapters = "qllama/tail/" if name == "stage2_generative" else "llm/periods/layers/first/"
    adapter = f"{adapters}attn/q_lora/a"
    rate = lambda path: run.optim.peak_lr * run.stage.lr_scale(path, ())
    expected = {**rates, adapter: 1e-4 if name == "stage2_generative" else 2e-4}
    assert {path: rate(path) for path in expected} == pytest.approx(expected)
    assert all(map(run.stage.trainable, expected))
    towers = ("vision/pos", "vision/blocks/layers/attn/qkv", "qllama/periods/layers/first/cross/q")
    assert not any(map(run.stage.trainable, (*towers, "llm/embedding", "llm/lm_head")))
    tower = run.stage.model.qllama if name == "stage2_generative" else run.stage.model.llm
    assert tower.lora and (tower.lora.rank, tower.lora.scale, tower.lora.dropout) == (16, 2, 0.05)
    assert bool(run.stage.model.vision.lora) == (name == "stage2_generative")
    assert r".*_lora/[ab]" in run.init.new_ok


def test_one_chip_is_for_adapters():
    assert experiment("stage2_generative", "lora,v6e_1x1").topology == "v6e:1x1"
    for name, argument in (("stage2_generative", "v6e_1x1"), ("stage3_finetune", "lora,v5e_1x1")):
        with pytest.raises(ValueError, match=f"Unknown argument '{argument.split(',')[-1]}'"):
            experiment(name, argument)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("stage0_language", "big"),
        ("stage1_contrastive", "mlp"),
        ("stage2_generative", "tiny,14b"),
        ("stage3_finetune", "70b"),
        ("demo", "stage1"),
    ],
)
def test_unknown_arguments_are_named(name, argument):
    module = importlib.import_module(f"configs.{name}")
    with pytest.raises(ValueError, match=argument.split(",")[-1]):
        module.get_config(argument)
