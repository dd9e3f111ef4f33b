"""Every stored search of the official code with transformers 4.37.2 (and 4.32.0): the same ids."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from internvl_jax.convert.case import Case
from internvl_jax.convert.verify_generation import generation

OLDER = "generation_transformers_4.32.0/"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = Path(__file__).parents[1] / "parity" / "packed_cases.py"
    spec = importlib.util.spec_from_file_location("pack", path)
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    return Case.read(pack.unpack("qllama_lm", tmp_path_factory.mktemp("case")))


@pytest.mark.parametrize("prefix", ["", OLDER])
def test_every_stored_setting(case: Case, prefix: str):
    stored = {
        name.removeprefix(prefix): value
        for name, value in case.outputs.items()
        if name.startswith(f"{prefix}gen.")
    }
    assert {name.split(".")[1] for name in stored} == set(case.config["generation"])
    got = generation(case.model(), case.config, case.inputs, count_seed=prefix == OLDER)
    for name, value in stored.items():
        if name.endswith(".sequences"):
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(got[name], value, atol=1e-4, err_msg=name)


def test_the_divisors_differ(case: Case):
    """Counting the BOS changes scores, so the two tables above are not one."""
    name = "gen.beam5.sequences_scores"
    assert np.max(np.abs(case.outputs[name] - case.outputs[OLDER + name])) > 0.01


def test_an_option_unknown_here_is_left_out(case: Case):
    config = {**case.config, "generation": {"odd": {"input_ids": "prompt_ids", "typical_p": 0.3}}}
    assert generation(case.model(), config, case.inputs) == {}
