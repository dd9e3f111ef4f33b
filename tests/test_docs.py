"""What the documentation names exists: links, headings, configs, settings, modules, targets."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from internvl_jax.train.experiment import completed

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
MENTIONED = re.compile(r"configs/(\w+)\.py(?::([\w,]+))?")
MODULE = re.compile(r"python -m ([\w.]+)")
TARGET = re.compile(r"`?\bmake ([a-z]+)\b")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """The text without code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> list[str]:
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [code for kind, code in found if kind == language]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def commands() -> list[str]:
    """Every line of the bash blocks, continued lines joined."""
    joined = [code.replace("\\\n", " ") for page in PAGES for code in blocks(page, "bash")]
    return [line for code in joined for line in code.splitlines() if line.strip()]


def config(name: str, argument: str):
    module = importlib.import_module(f"configs.{name}")
    return module.get_config(argument) if argument else module.get_config()


def test_pages_are_found():
    names = {page.name for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "architecture.md", "data.md"} <= names
    assert {"demo.md", "paper_map.md", "parity.md", "training.md"} <= names


@pages
def test_links_resolve(page: Path):
    broken = []
    for link in LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        if ":" in path:  # another site's address
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pages
def test_every_page_is_linked(page: Path):
    linked = {
        (other.parent / link.partition("#")[0]).resolve()
        for other in PAGES
        for link in LINK.findall(prose(other))
        if other != page and ":" not in link
    }
    assert page.name == "README.md" or page in linked


def test_configs_load():
    mentioned = {m for page in PAGES for m in MENTIONED.findall(page.read_text(encoding="utf-8"))}
    arguments = {(name, argument) for name, argument in mentioned if argument != "STAGE"}
    assert {name for name, _ in arguments} >= {"stage1_contrastive", "stage3_finetune", "demo"}
    tables = {"mixtures", "topologies", "tiny"}  # what configurations share
    for name, argument in sorted(arguments):
        if name in tables or name.startswith("clean"):
            continue
        made = config(name, argument)
        if name.startswith("clean"):
            continue
        assert "stage" in made or "rows" in made, (name, argument)


def test_overridden_settings_exist():
    seen = 0
    for line in commands():
        found = re.search(r"--config=configs/(\w+)\.py(?::([\w,]+))?", line)
        for setting in re.findall(r"--config\.([\w.]+)=", line) if found else ():
            node = config(*found.groups(default=""))
            node = completed(node) if "train" in node else node
            for name in setting.split("."):
                assert name in node, f"{setting} in: {line}"
                node = node[name]
            seen += 1
    assert seen > 5


def test_modules_exist():
    modules = {name for page in PAGES for name in MODULE.findall(page.read_text(encoding="utf-8"))}
    ours = {m for m in modules if m.split(".")[0] in ("internvl_jax", "data_pipelines", "launch")}
    assert {"internvl_jax.train", "internvl_jax.convert", "data_pipelines.build"} <= ours
    for name in ours:
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        if spec.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{name}.__main__") is not None, name


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    code = [*commands(), *(t for page in PAGES for t in re.findall(r"`([^`\n]+)`", prose(page)))]
    named = {target for text in code for target in TARGET.findall(text)}
    assert {"demo", "test", "setup"} <= named <= set(targets)


@pages
def test_python_parses(page: Path):
    for code in blocks(page, "python"):
        ast.parse(code)
