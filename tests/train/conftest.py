"""A stage small enough to compute by hand, and the tiny configs on generated pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from data_pipelines.build import build
from internvl_jax.nn.param import normal, param, zeros
from internvl_jax.stages.stage import EmbeddingStage
from internvl_jax.train.experiment import Experiment, resolve
from internvl_jax.train.loop import train


class Line(nnx.Module):
    """y = frozen * (x @ kernel + bias)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.kernel = param(rngs, (3, 2), ("embed", None), normal(1.0))
        self.bias = param(rngs, (2,), (None,), zeros)
        self.frozen = param(rngs, (2,), (None,), normal(1.0))


@dataclasses.dataclass(frozen=True)
class LineStage(EmbeddingStage):
    """Mean squared output; its loss is a function of embeddings, so gradients can be cached."""

    trainable_paths: tuple[str, ...] = ("kernel", "bias")

    name: ClassVar[str] = "line"

    @property
    def vocab_size(self) -> int:
        return 0  # it reads no text

    def build(self, rngs: nnx.Rngs) -> Line:
        return Line(rngs=rngs)

    def flops(self) -> int:
        return 3 * 2 * 3 * 2

    def embed(self, model: Any, batch: Any, key: jax.Array | None) -> jax.Array:
        return (batch["x"] @ model.kernel[...] + model.bias[...]) * model.frozen[...]

    def loss_from_embeddings(self, model: Any, embeddings: Any, batch: Any):
        loss = jnp.mean(jnp.sum(embeddings**2, axis=-1))
        return loss, {"largest": jnp.max(jnp.abs(embeddings))}


@pytest.fixture(scope="session")
def line() -> LineStage:
    return LineStage()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated pictures and their tokenizer, built once."""
    folder = tmp_path_factory.mktemp("data")
    build("shapes", folder, report=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def tiny(data_dir: Path) -> Callable[..., Experiment]:
    """A tiny experiment by config and argument, with settings replaced by dotted name."""

    def make(name: str, argument: str = "tiny", /, **settings: Any) -> Experiment:
        config = importlib.import_module(f"configs.{name}").get_config(argument)
        tokenizer = str(data_dir / "shapes" / "1.0.0" / "tokenizer.model")
        config.data = {**config.data, "data_dir": str(data_dir), "tokenizer": tokenizer}
        for name, value in settings.items():
            group, _, setting = name.partition("__")
            if setting:
                config[group] = {**config.get(group, {}), setting: value}
            else:
                config[group] = value
        return resolve(config)

    return make


@dataclasses.dataclass(frozen=True)
class Finished:
    """One run of the chain: what it was, where it is, its exit code and what it said."""

    experiment: Experiment
    workdir: Path
    code: int
    said: str


@pytest.fixture(scope="session")
def chain(tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """Stages 0 to 3, each started from the one before."""
    runs = tmp_path_factory.mktemp("runs")
    short = dict(train__eval_every=4, train__save_every=4, train__global_batch=8, train__keep=5)
    finished: dict[str, Finished] = {}

    def run(key: str, experiment: Experiment) -> None:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = train(experiment, str(runs / key))
        finished[key] = Finished(experiment, runs / key, code, said.getvalue())

    def sources(*names: str, **more: Any) -> dict[str, Any]:
        return dict(sources=tuple(dict(path=str(runs / n)) for n in names), **more)

    run("language", tiny("stage0_language", train__steps=8, **short))
    first = dict(path=str(runs / "language"), rename=(("llm", "qllama"),))
    new = (r"vision/.*", r"clip_projector/.*", r"text_projection", r"logit_scale")
    phases = (
        dict(until=4, stage=dict(image_size=24, keep=0.5)),
        dict(until=8, stage=dict(image_size=32, keep=1.0)),
    )
    run(
        "contrastive",
        tiny(
            "stage1_contrastive",
            train__steps=8,
            phases=phases,
            init=dict(sources=(first,), new_ok=new),
            **{**short, "train__save_every": 2},
        ),
    )
    new = (r"query_tokens", r".*/cross/.*", r"clip_projector2/.*", r"itm_.*")
    run(
        "generative",
        tiny(
            "stage2_generative",
            train__steps=8,
            init=sources("contrastive", new_ok=new),
            **short,
        ),
    )
    heads = (r"clip_projector2?/.*", r"itm_.*", r"text_projection", r"logit_scale")
    run(
        "finetune",
        tiny(
            "stage3_finetune",
            "mlp,qllama,tiny",
            train__steps=8,
            init=sources(
                "generative",
                new_ok=(r"projector/.*", r"query_projector/.*", r"llm/.*"),
                dropped_ok=heads,
            ),
            **short,
        ),
    )
    return finished
