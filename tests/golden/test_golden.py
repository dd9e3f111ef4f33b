"""Every resolved config and every full-size sharding, line by line: a change shows in review.

After a change that is meant, write the files anew and look at the difference:

    UPDATE_GOLDEN=1 python -m pytest tests/golden && git diff tests/golden
"""

from __future__ import annotations

import difflib
import importlib
import math
import os
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from configs import stage1_contrastive, stage2_generative, stage3_finetune
from internvl_jax.config import resolved_text
from internvl_jax.models.definition import Definition
from internvl_jax.sharding.mesh import AXES
from internvl_jax.train.experiment import resolve
from internvl_jax.tree import flatten

HERE = Path(__file__).parent
ARGUMENTS = {
    "stage0_language": ["", "tiny"],
    "stage1_contrastive": ["", "tiny", "colab", *stage1_contrastive.TOPOLOGIES],
    "stage2_generative": [
        *("", "tiny", "retrieval", "retrieval,tiny", "lora", "retrieval,lora", "lora,tiny"),
        *(f"lora,{name}" for name in stage2_generative.ONE_CHIP),
        *stage2_generative.TOPOLOGIES,
    ],
    "stage3_finetune": [
        *("", "mlp", "13b", "mlp,qllama", "qllama,13b", "tiny", "mlp,qllama,tiny"),
        *("2b", "mlp,2b", "lora", "mlp,qllama,lora", "lora,tiny"),
        *(f"sft,qllama,13b,{name}" for name in stage3_finetune.TOPOLOGIES),
        *(f"lora,{size},{n}" for size, some in stage3_finetune.ONE_CHIP.items() for n in some),
    ],
    "demo": ["language", "llm", "contrastive", "generative", "projector", "chat"],
}
SHARDED = ["stage1_contrastive", "stage2_generative", "stage3_finetune:sft,qllama,13b"]
MESHES = [(1, 128, 1), (1, 32, 4)]


def compare(name: str, text: str) -> None:
    path = HERE / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{name} is missing: see the first lines of {Path(__file__).name}."
    stored = path.read_text(encoding="utf-8")
    if stored != text:
        lines = difflib.unified_diff(stored.splitlines(), text.splitlines(), name, "now", n=0)
        pytest.fail("\n".join(lines), pytrace=False)


def experiment(name: str):
    module, _, argument = name.partition(":")
    return resolve(importlib.import_module(f"configs.{module}").get_config(argument))


def test_every_config_is_listed():
    modules = {p.stem for p in (HERE.parents[1] / "configs").glob("*.py")}
    # What is shared between configs is none, nor is the list of plans; cleaning trains nothing.
    others = {"__init__", "lora", "mixtures", "tiny", "topologies", "plan"}
    others |= {"clean_stage1", "clean_stage2"}
    assert modules - others == set(ARGUMENTS)


@pytest.mark.parametrize("name", [f"{m}:{a}" for m, args in ARGUMENTS.items() for a in args])
def test_resolved_config(name):
    file = name.rstrip(":").replace(":", "_").replace(",", "_")
    compare(f"configs/{file}.txt", resolved_text(experiment(name)))


def test_no_golden_file_is_left_behind():
    expected = {
        f"{m}:{a}".rstrip(":").replace(":", "_").replace(",", "_")
        for m, args in ARGUMENTS.items()
        for a in args
    }
    assert {p.stem for p in (HERE / "configs").glob("*.txt")} == expected


@pytest.mark.parametrize("name", SHARDED)
def test_sharding_of_every_parameter(name):
    """At full size: what a parameter is split over, and how much of it one device holds."""
    settings = experiment(name)
    definition = Definition.of(settings.stage.build, settings.stage.trainable)
    lines = []
    for sizes in MESHES:
        mesh = AbstractMesh(sizes, AXES)
        trees = definition.abstract(mesh, settings.train.frozen_dtype)
        lines += [f"mesh {' x '.join(f'{a} {n}' for a, n in zip(AXES, sizes, strict=True))}"]
        for kind, tree in zip(("trained", "frozen"), trees, strict=True):
            held = 0
            for path, leaf in flatten(tree).items():
                shard = leaf.sharding.shard_shape(leaf.shape)
                held += math.prod(shard) * leaf.dtype.itemsize
                split = ", ".join(
                    f"{logical}/{axis}" if axis else str(logical or size)
                    for logical, axis, size in zip(
                        definition.axes(path), leaf.sharding.spec, leaf.shape, strict=True
                    )
                )
                shape = "x".join(map(str, leaf.shape)) or "scalar"
                lines.append(f"  {kind} {path} {leaf.dtype} {shape} ({split})")
            count = sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
            lines.append(f"  {kind}: {count:,} parameters, {held / 2**30:.3f} GiB per device")
    file = name.replace(":", "_").replace(",", "_")
    compare(f"shardings/{file}.txt", "\n".join(lines) + "\n")
