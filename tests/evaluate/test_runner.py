"""From a model to figures and a page, on the shapes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_pipelines.datasets import open_dataset
from internvl_jax.evaluate import runner
from internvl_jax.evaluate.report import render
from internvl_jax.evaluate.report.demo import demo_report

DATA = {"dataset": "shapes"}
LANGUAGES = ("en", "ar")


@pytest.fixture(scope="module")
def results(model, chat_model, tokenizer):
    common = dict(image_size=16, languages=LANGUAGES)
    text = common | dict(text_length=24, batch_size=10)
    return {
        "stage1": runner.evaluate_contrastive(model, tokenizer, DATA, mode="C", **text),
        "stage2": runner.evaluate_generative(
            model, tokenizer, DATA, caption_limit=3, lists=("judged",), **text
        ),
        "stage3": runner.evaluate_chat(
            chat_model, tokenizer, DATA, limit=3, lists=("judged",), batch_size=8, **common
        ),
    }


def test_every_figure_is_a_number_with_its_chance(results):
    for figures, _ in results.values():
        assert all(type(v) is float and np.isfinite(v) for v in figures.values())
    first, second, third = (figures for figures, _ in results.values())
    assert first["turned.en.n"] == 32 and first["turned_unseen.ar.n"] == 4
    assert first["turned_all.en.chance_R@10"] == pytest.approx(10 / 36)
    assert second["turned.itm_n"] == 128 and second["turned.ar.caption_n"] == 3
    assert third["turned.which_n"] == 6 and third["turned.en.is_chance"] == 0.5
    assert not any("unseen" in name for name in second | third)


def test_figures_and_examples_can_be_kept_as_json(results):
    kept = json.loads(json.dumps(results))
    assert {stage: tuple(part) for stage, part in kept.items()} == results


def test_the_page_shows_them(results):
    figures = {
        f"{stage}.{name}": value
        for stage, (part, _) in results.items()
        for name, value in part.items()
    }
    examples = {stage: part for stage, (_, part) in results.items()}
    page = render(demo_report(figures, examples, languages=LANGUAGES, vendor="turned"))
    for title in ("From picture to name", "From name to picture", "Captions", "A dialogue"):
        assert title in page
    assert f"{figures['stage1.turned.ar.i2t_R@10']:.3f}" in page
    assert page.count("data:image/png") > 20


def test_the_split_gives_the_figures_their_name():
    shapes = open_dataset("shapes")
    assert runner.vendor(shapes, "held_out") == "turned"
    assert runner.vendor(shapes, "validation") == "validation"
