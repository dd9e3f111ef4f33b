"""An exported folder serves by itself: nothing on the path but it, and no jax to be had."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.text import Tokenizer
from internvl_jax.convert import runtime
from internvl_jax.convert.formats import FORMATS, About
from internvl_jax.convert.from_torch import WeightsError
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig

torch = pytest.importorskip("torch")

from internvl_jax.convert.runtime import Engine  # noqa: E402
from internvl_jax.convert.runtime.__main__ import main  # noqa: E402
from tests.convert.runtime.conftest import LLAMA, QLLAMA, VIT  # noqa: E402

STAGE = {"image_size": 28, "text_length": 14}
# What must not be there, as on a machine that never heard of it.
BLOCKED = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "internvl_jax", "data_pipelines"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Nothing())
"""


@pytest.fixture(scope="module")
def folders(exported: Callable, tokenizer: Path) -> dict[str, Path]:
    size = Tokenizer(tokenizer).vocab_size
    qllama, llm = (dataclasses.replace(c, vocab_size=size) for c in (QLLAMA, LLAMA))
    cfg = InternVLConfig(vision=VIT, qllama=qllama, queries=3, embed_dim=8, pool_heads=2)
    data = {"languages": ("en", "zh"), "resize": "square"}
    told: dict[str, Any] = dict(stage=STAGE, data=data, tokenizer=tokenizer, origin="Step 7.")
    chat = ChatConfig(vision=VIT, llm=llm, projector="mlp1")
    found = {"retrieval": exported(cfg, **told), "dialogue": exported(chat, **told)}
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for pair in found.values():
        for name in ("cat.png", "cat.jpg", "dog.jpg"):
            Image.fromarray(picture).save(pair.folder / name)
    return {name: pair.folder for name, pair in found.items()}


def run(folder: Path, code: str) -> str:
    """What a fresh interpreter prints that has the folder on its path and no jax."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + code],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(folder: Path, *argvs: tuple[str, ...]) -> list[str]:
    """What `python -m internvl_torch ARGV` prints, for several in one interpreter."""
    code = f"""
import contextlib, io, json
from internvl_torch.__main__ import main
said = []
for argv in {argvs!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(list(argv)) == 0, argv
    said.append(out.getvalue())
print(json.dumps(said))
"""
    return json.loads(run(folder, code))


def test_what_an_export_holds(folders: dict[str, Path]) -> None:
    folder = folders["retrieval"]
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.json", "LICENSE", "README.md", "requirements.txt", "tokenizer.model"}
    code = {p.name for p in (folder / "internvl_torch").iterdir()}
    assert {"__init__.py", "__main__.py", "engine.py", "load.py"} <= code
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["version"], config["kind"]) == (
        "internvl_jax.plain",
        1,
        "internvl",
    )
    assert config["text"]["prompts"] == {"en": "English caption:", "zh": "Chinese caption:"}
    assert config["text"]["length"] == 14 and config["image"]["resize"] == "squash"
    assert "drop_path" not in config["model"]["vision"]
    card = (folder / "README.md").read_text()
    assert "Step 7." in card and "python -m internvl_torch caption" in card


def test_a_tokenizer_of_another_kind_travels_but_is_not_read(
    exported: Callable, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    cfg = InternVLConfig(vision=VIT, qllama=QLLAMA, queries=3, embed_dim=8, pool_heads=2)
    folder = exported(cfg, tokenizer=tmp_path / "tokenizer.json").folder
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert Engine.load(folder, device="cpu").abilities == {"embed_image"}
    assert "embed-text" not in (folder / "README.md").read_text()


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Path) -> None:
    about = About(LLAMA, tokenizer=tokenizer)
    with pytest.raises(WeightsError, match="the model's vocabulary is 60"):
        FORMATS["plain"].files(about)


def test_the_code_names_no_other_framework() -> None:
    """Also where it is loaded late, or by no test here."""
    root = Path(runtime.__file__).parent
    taken = set()
    for path in root.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                taken |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                taken.add(str(node.module).split(".")[0])
    assert {"torch", "safetensors", "numpy", "sentencepiece", "PIL"} <= taken
    assert not taken & {"jax", "flax", "internvl_jax", "data_pipelines", "transformers"}


def test_every_command_for_a_retrieval_model(folders: dict[str, Path]) -> None:
    folder = folders["retrieval"]
    info, _, rows, scored, said = commands(
        folder,
        ("info",),
        ("embed-image", "cat.png", "cat.png", "--mode", "G", "--out", "rows.npy"),
        ("embed-text", "a cat", "a dog"),
        ("score", "--image", "cat.png", "--text", "a cat", "--mode", "ITM"),
        ("caption", "cat.png", "--language", "zh", "--max-new-tokens", "5"),
    )
    assert json.loads(info)["abilities"] == ["caption", "embed_image", "embed_text", "score"]
    engine = Engine.load(folder, device="cpu")
    shown = engine.decode_image((folder / "cat.png").read_bytes())
    expected = engine.embed_image([shown, shown], "G")
    np.testing.assert_allclose(np.load(folder / "rows.npy"), expected, atol=1e-6)
    vectors = [json.loads(row) for row in rows.splitlines()]
    np.testing.assert_allclose(vectors, engine.embed_text(["a cat", "a dog"]), atol=1e-6)
    path, text, value = scored.strip().split("\t")
    assert (path, text) == ("cat.png", "a cat")
    assert float(value) == pytest.approx(engine.score([shown], ["a cat"], "ITM")[0, 0], abs=1e-4)
    how = engine.settings(max_new_tokens=5)
    assert said == f"cat.png\t{engine.caption([shown], ['Chinese caption:'], how)[0]}\n"


def test_a_conversation_by_command(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders["dialogue"]
    argv = ["chat", "--model", str(folder), "--image", str(folder / "cat.png"), "--prompt", "what"]
    argv += ["--prompt", "is", "--device", "cpu", "--max-new-tokens", "4"]
    said = []
    for further in ([], [], ["--temperature", "9", "--seed", "3"], ["--top-k", "40"]):
        assert main([*argv, *further]) == 0
        said.append(capsys.readouterr().out)
        assert said[-1].startswith("USER: what\nASSISTANT: ")
        assert said[-1].count("USER: is\nASSISTANT: ") == 1
    assert said[0] == said[1] and len({*said}) == 3


@pytest.mark.parametrize("name", ["retrieval", "dialogue"])
def test_what_the_card_says_works(
    name: str,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folders[name])
    card = Path("README.md").read_text()
    begun = "python -m internvl_torch "
    lines = [line.removeprefix(begun) for line in card.splitlines() if line.startswith(begun)]
    assert len(lines) == {"retrieval": 5, "dialogue": 2}[name]
    for line in lines:
        verb, *rest = shlex.split(line)
        short = ["--max-new-tokens", "3"] * (verb in ("caption", "chat"))
        assert main([verb, "--model", ".", "--device", "cpu", *rest, *short]) == 0, line
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "internvl_torch", runtime)
    exec(
        card.split("```python\n")[1].split("```")[0].replace("settings()", "settings(**LESS)"),
        {"LESS": {"max_new_tokens": 3}},
    )
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("embed-image", "nowhere.png"), "nowhere.png"),
        (("embed-image", "README.md"), "README.md: The data is no readable picture"),
        (("caption", "cat.png", "--language", "xx"), "no prompt for the language 'xx'"),
        (("caption", "cat.png", "--beams", "0"), "num_beams=0"),
        (("chat", "--prompt", "a"), "cannot chat"),
        (("info", "--model", "internvl_torch"), "There is no internvl_torch/config.json"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    argv: tuple[str, ...],
    said: str,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folders["retrieval"])
    assert main([argv[0], "--model", ".", *argv[1:], "--device", "cpu"]) == 78
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_the_code_takes_nothing_but_itself(folders: dict[str, Path]) -> None:
    """Loaded and used, it has imported torch, safetensors, numpy, and nothing else of weight."""
    code = (
        "from internvl_torch import Engine\n"
        "engine = Engine.load('.', device='cpu')\n"
        "engine.embed_text(['a cat'])\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    loaded = set(run(folders["retrieval"], code).split())
    assert {"torch", "safetensors", "sentencepiece"} <= loaded
    assert not loaded & {"jax", "flax", "transformers", "PIL", "ml_dtypes", "internvl_jax"}


@pytest.mark.slow
def test_compiled_it_says_the_same(folders: dict[str, Path]) -> None:
    code = """
from internvl_torch import Engine
import numpy as np
eager, fast = (Engine.load('.', device='cpu', compile=c) for c in (False, True))
shown = eager.decode_image(open('cat.png', 'rb').read())
a, b = (e.embed_image([shown] * 2) for e in (eager, fast))
assert np.abs(a - b).max() < 1e-4
for prompt in ('a', 'a cat'):
    how = eager.settings(max_new_tokens=6, num_beams=2)
    a, b = (e.caption([shown] * 2, ['a', prompt], how) for e in (eager, fast))
    assert a == b, (a, b)
"""
    run(folders["retrieval"], code)
