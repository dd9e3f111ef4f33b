"""The layout's rules: who may import whom, who names mesh axes, what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("internvl_jax", "data_pipelines", "configs", "launch")

# What each room of internvl_jax may take from the others; a room not named here stands on top of
# all of them. `batch`, `chips` and `config` are leaves anyone may read, except where listed.
LEAVES = {"batch", "chips", "config", "crop", "tree"}
MAY_IMPORT = {
    "batch": set(),
    "chips": set(),
    "crop": set(),
    "tree": set(),
    "config": {"batch", "chips"},
    "sharding": LEAVES,
    "losses": set(),
    "nn": LEAVES | {"sharding"},
    "models": LEAVES | {"sharding", "nn"},
    "checkpoint": LEAVES | {"sharding"},
    "observe": LEAVES | {"sharding"},
    "pretrained": LEAVES | {"sharding", "nn", "models", "stages", "checkpoint", "convert"},
    "generate": LEAVES | {"sharding", "nn", "models", "checkpoint", "convert", "pretrained"},
    "convert": LEAVES
    | {"sharding", "nn", "models", "losses", "checkpoint", "generate", "stages"}
    | {"observe", "pretrained"},
    "stages": LEAVES | {"sharding", "nn", "models", "losses", "generate"},
    "evaluate": LEAVES
    | {"sharding", "nn", "models", "losses", "stages", "checkpoint", "observe", "generate"}
    | {"pretrained"},
}
MESH_AXES = {"replica", "fsdp", "tensor"}
HEAVY = {
    *(
        "jax",
        "flax",
        "optax",
        "orbax",
        "torch",
        "transformers",
        "tensorflow",
        "tensorflow_datasets",
    ),
    *("grain", "clu", "sentencepiece", "matplotlib", "tensorboardX", "wandb", "pyvips"),
}


def files() -> list[Path]:
    return sorted(p for top in CODE for p in (ROOT / top).rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything a file imports, at any depth of the code."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def room(path: Path) -> str:
    """`nn` for internvl_jax/nn/norm.py, `batch` for internvl_jax/batch.py."""
    return path.relative_to(ROOT).with_suffix("").parts[1]


def test_the_code_is_found():
    assert ROOT / "internvl_jax" / "__init__.py" in files()


def test_direction():
    wrong = []
    for path in files():
        if path.relative_to(ROOT).parts[0] != "internvl_jax" or room(path) not in MAY_IMPORT:
            continue
        for line, name in imports(path):
            top, _, rest = name.partition(".")
            target = rest.split(".")[0]
            allowed = MAY_IMPORT[room(path)] | {room(path), "__version__"}
            if top == "internvl_jax" and target not in allowed:
                wrong.append(f"{where(path, line)} {room(path)} imports {name}")
            if top in ("configs", "launch", "tests"):
                wrong.append(f"{where(path, line)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_losses_import_only_jax():
    allowed = {"jax", "jaxtyping", "__future__", "internvl_jax"} | set(sys.stdlib_module_names)
    wrong = [
        f"{where(path, line)} imports {name}"
        for path in files()
        if path.is_relative_to(ROOT / "internvl_jax" / "losses")
        for line, name in imports(path)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_data_pipelines_take_only_batch_and_config():
    wrong = [
        f"{where(path, line)} imports {name}"
        for path in files()
        if path.is_relative_to(ROOT / "data_pipelines")
        for line, name in imports(path)
        if name.split(".")[0] in ("internvl_jax", "configs", "launch")
        and not f"{name}.".startswith(("internvl_jax.batch.", "internvl_jax.config."))
        # The page of examples must be what a run sees, so it asks the run's settings.
        and not (path.name == "inspect.py" and name.startswith("internvl_jax.train.experiment"))
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_only_in_convert_and_tensorflow_nowhere():
    wrong = []
    for path in files():
        converts = path.is_relative_to(ROOT / "internvl_jax" / "convert")
        for line, name in imports(path):
            top = name.split(".")[0]
            if top == "tensorflow" or (top in ("torch", "transformers") and not converts):
                wrong.append(f"{where(path, line)} imports {name}")
            # Both import TensorFlow, which is not there.
            if name.startswith(("clu.metric_writers", "clu.periodic_actions")):
                wrong.append(f"{where(path, line)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_only_sharding_names_mesh_axes():
    """Configs and launchers set their sizes; everyone else speaks of logical axes."""
    wrong = []
    for path in files():
        if path.relative_to(ROOT).parts[0] != "internvl_jax" or room(path) == "sharding":
            continue
        tree = parsed(path)
        prose = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in ast.walk(node)
        }
        wrong += [
            f"{where(path, node.lineno)} names the mesh axis {node.value!r}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value in MESH_AXES and id(node) not in prose
        ]
    assert not wrong, "\n".join(wrong)


def test_no_room_for_leftovers():
    names = {"utils", "util", "common", "helpers", "helper", "misc"}
    wrong = [
        str(path.relative_to(ROOT))
        for path in files()
        if names & set(path.relative_to(ROOT).with_suffix("").parts)
    ]
    assert not wrong, wrong


def loaded(code: str, *argv: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    report = "; import sys; print('\\n'.join({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code + report, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "package",
    [p for p in ("internvl_jax", "data_pipelines") if (ROOT / p / "__init__.py").exists()],
)
def test_import_is_cheap(package: str):
    assert not loaded(f"import {package}") & HEAVY


DOORS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in files()
    if "__main__" in path.read_text(encoding="utf-8") or path.name == "__main__.py"
)


@pytest.mark.parametrize("door", DOORS)
def test_help_is_cheap(door: str):
    """`python -m DOOR --help` explains itself without loading what the work itself needs."""
    code = (
        "import runpy, sys, contextlib\n"
        f"sys.argv = [{door!r}, '--help']\n"
        "try:\n"
        "    with contextlib.redirect_stdout(sys.stderr):\n"
        f"        runpy.run_module({door!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    assert end.code in (None, 0, 1), end.code\n"  # absl leaves --help with 1
        "pass"
    )
    assert not loaded(code) & HEAVY


def test_help_lists_every_make_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = next(line for line in text.splitlines() if line.startswith(".PHONY:")).split()[1:]
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"make {target} " in shown.stdout for target in targets)
