"""From data to dataclasses: every wrong setting is one sentence that names it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from internvl_jax.config import (
    EXIT_CONFIG,
    ConfigError,
    build,
    complete,
    load,
    resolved_text,
    to_dict,
)

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    names: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate={self.rate} must not be negative.")


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = Inner()
    maybe: Inner | None = None
    limit: int | None = None
    pair: tuple[int, float] = (1, 2.0)
    free: dict[str, Any] = dataclasses.field(default_factory=dict)
    flag: bool = False
    label: str = ""


def test_nested_data_becomes_dataclasses():
    values = ConfigDict(
        dict(
            steps=3.0,
            inner=dict(rate=1, names=["a", "b"]),
            maybe=dict(rate=2),
            limit=4,
            pair=(2, 3),
            free=dict(x=[1, dict(y=2)]),
        )
    )
    result = build(Outer, values)
    assert result == Outer(
        steps=3,
        inner=Inner(1.0, ("a", "b")),
        maybe=Inner(2.0),
        limit=4,
        pair=(2, 3.0),
        free={"x": (1, {"y": 2})},
    )
    assert isinstance(result.steps, int) and isinstance(result.inner.rate, float)
    assert build(Outer, to_dict(result)) == result
    assert build(Outer, json.loads(json.dumps(to_dict(result)))) == result


def test_defaults_fill_what_is_missing():
    assert build(Outer, dict(steps=1)) == Outer(1)
    assert build(Outer, dict(steps=1, maybe=None, limit=None)) == Outer(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "config lacks the setting(s) steps: give them a value."),
        (dict(stepz=1), "config has no setting 'stepz': did you mean steps?"),
        (dict(steps=1, qqq=1), "config has no setting 'qqq': it has steps, inner, maybe"),
        (dict(steps="3"), "config.steps is '3': a int is needed."),
        (dict(steps=2.5), "config.steps is 2.5: a int is needed."),
        (dict(steps=True), "config.steps is True: a int is needed."),
        (dict(steps=1, flag=1), "config.flag is 1: a bool is needed."),
        (dict(steps=1, limit="x"), "config.limit is 'x': a int is needed."),
        (dict(steps=1, inner=dict(rat=1)), "config.inner has no setting 'rat': did you mean rate?"),
        (dict(steps=1, inner=dict(rate=-1)), "config.inner: rate=-1.0 must not be negative."),
        (dict(steps=1, inner=3), "config.inner is 3: give a group of settings."),
        (dict(steps=1, inner=dict(names="ab")), "config.inner.names is 'ab': give a tuple."),
        (dict(steps=1, inner=dict(names=[1])), "config.inner.names[0] is 1: a str is needed."),
        (dict(steps=1, pair=(1,)), "config.pair has 1 entries, 2 are needed."),
    ],
)
def test_every_wrong_setting_is_named(values, message):
    with pytest.raises(ConfigError) as error:
        build(Outer, values)
    assert str(error.value).startswith(message)


def test_resolved_text_lists_every_setting():
    lines = resolved_text(Outer(3, inner=Inner(0.5, ("ü",)))).splitlines()
    assert "steps = 3" in lines
    assert "inner.rate = 0.5" in lines
    assert 'inner.names = ["ü"]' in lines
    assert "limit = null" in lines


def test_completed_configs_hold_every_setting():
    config = complete(ConfigDict(dict(steps=3, inner=dict(rate=2.0))), Outer)
    assert config.inner.rate == 2.0 and config.inner.names == ()
    assert config.label == "" and config.flag is False
    config.limit = 7  # a placeholder: absent, but of a type
    assert build(Outer, config) == Outer(3, inner=Inner(2.0), limit=7)


def test_files(tmp_path):
    with pytest.raises(ConfigError, match=r"missing.py does not exist: check --config"):
        load(f"{tmp_path}/missing.py:x")
    (tmp_path / "none.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="has no get_config"):
        load(f"{tmp_path}/none.py")
    with pytest.raises(ConfigError, match=r"stage1_contrastive.py: Unknown argument 'huge'"):
        load(f"{ROOT}/configs/stage1_contrastive.py:huge")
    assert load(f"{ROOT}/configs/stage1_contrastive.py:tiny").train.steps == 20


TINY = "--config=configs/stage0_language.py:tiny"


def train(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "internvl_jax.train", *arguments]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([TINY, "--config.optim.peak_lrr=1"], "peak_lr"),
        ([TINY, "--config.optim.schedule=linear"], "config.optim: schedule='linear'"),
        ([], "No configuration: give --config=configs/NAME.py[:argument]."),
    ],
)
def test_the_command_line_refuses_in_one_sentence(arguments, sentence, tmp_path):
    done = train(*arguments, f"--workdir={tmp_path}")
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_overrides_reach_the_resolved_config(tmp_path):
    done = train(
        TINY, "--config.optim.ema=0.9", "--print_config", f"--workdir={tmp_path}", "--config.seed=3"
    )
    assert done.returncode == 0, done.stderr
    assert "optim.ema = 0.9\n" in done.stdout and "seed = 3\n" in done.stdout
    assert list(tmp_path.iterdir()) == []
