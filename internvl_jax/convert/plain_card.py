"""The model card of a ``plain`` export: what it is, where from, and the commands that serve it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internvl_jax.convert.formats import About
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig

RUN = "python -m internvl_torch"
WHAT: dict[type, str] = {
    VitConfig: "an InternViT vision tower",
    LlamaConfig: "a language model",
    InternVLConfig: "an InternVL model: pictures and texts in one space",
    ChatConfig: "an InternVL dialogue model",
}
RESIZED = {
    "squash": "resized to a square whatever their aspect",
    "crop": "resized by the shorter side and cropped at the centre",
    "pad": "padded to a square and resized",
}


def card(about: About, config: Mapping[str, Any]) -> str:
    """A README in Markdown with YAML metadata.

    Args:
        about: the model.
        config: its ``config.json``.
    """
    cfg = about.cfg
    said = [about.origin] if about.origin else []
    said.append(f"{cfg.param_count():,} parameters, stored as {about.dtype}.")
    if (image := config["image"]) is not None:
        how = RESIZED[image["resize"]]
        said.append(f"Pictures are {how}, {image['size']} px; mean and deviation of ImageNet.")
    if isinstance(cfg, InternVLConfig):
        prefix = config["text"]["prefix"]
        said.append(
            f"Texts to embed are prefixed with `{prefix}` and cut at "
            f"{config['text']['length']} tokens."
        )
    texts = config["text"] is not None and config["text"]["tokenizer"] is not None
    if config["text"] is not None and not texts:
        said.append("It was exported without a sentencepiece tokenizer and reads no texts.")
    commands = "\n".join(_commands(cfg, config, texts))
    tags = "\n".join(f"- {tag}" for tag in ("internvl", "internvl-jax", "pytorch"))
    return f"""\
---
tags:
{tags}
---

# {WHAT[type(cfg)][0].upper() + WHAT[type(cfg)][1:]}

{" ".join(said)}

Everything that runs it lies in `internvl_torch/`: PyTorch code without any other framework, read
strictly against the weights (`config.json` names the format). No code is fetched.

## Use

```bash
pip install -r requirements.txt   # in this folder
{commands}
```

`--help` after a command says more; `--device`, `--dtype` and `--compile` say where and how it is
computed. In Python:

```python
from pathlib import Path

from internvl_torch import Engine

engine = Engine.load(".")
{_python(cfg, texts)}
```

## Bias and limits

A model repeats what its data says. Where that matters, test it on your own cases first. `LICENSE`
is that of the code; what the weights may be used for also depends on the data and the models they
were trained from.
"""


def _commands(cfg: Any, config: Mapping[str, Any], texts: bool) -> list[str]:
    lines = [f"{RUN} info"]
    if isinstance(cfg, VitConfig | InternVLConfig):
        lines.append(f"{RUN} embed-image cat.jpg dog.jpg --out images.npy")
    if isinstance(cfg, InternVLConfig) and texts:
        mode = " --mode G" if cfg.queries else ""
        lines.append(f'{RUN} embed-text "a cat" "a dog"')
        lines.append(f'{RUN} score --image cat.jpg --text "a cat" "a dog"{mode}')
        if cfg.queries:
            lines.append(
                f"{RUN} caption cat.jpg --language {next(iter(config['text']['prompts']))}"
            )
    if isinstance(cfg, ChatConfig) and texts:
        lines.append(f'{RUN} chat --image cat.jpg --prompt "What is this?"')
    if isinstance(cfg, LlamaConfig) and texts:
        lines.append(f'{RUN} chat --prompt "What is a cat?"')
    lines.append("python -m internvl_torch.server   # over HTTP, on 127.0.0.1")
    return lines


def _python(cfg: Any, texts: bool) -> str:
    picture = 'picture = engine.decode_image(Path("cat.jpg").read_bytes())\n'
    if isinstance(cfg, ChatConfig):
        return picture + (
            'turns = [{"from": "human", "value": "<image>\\nWhat is this?"}]\n'
            "print(engine.chat([[picture]], [turns], engine.settings())[0].text)"
        )
    if isinstance(cfg, LlamaConfig):
        return (
            'turns = [{"from": "human", "value": "What is a cat?"}]\n'
            "print(engine.chat([[]], [turns], engine.settings())[0].text)"
        )
    vector = f"{picture}vector = engine.embed_image([picture])  # float32 [1, E], of length one"
    if isinstance(cfg, InternVLConfig) and texts:
        vector += '\nprint(engine.score([picture], ["a cat", "a dog"]))'
    return vector
