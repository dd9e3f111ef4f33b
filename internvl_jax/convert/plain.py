"""What lies beside the weights of a ``plain`` export: its config, the runtime's code, a card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from internvl_jax.batch import LANGUAGES, MEAN, STD, SUMMARIZE, caption_prompt, template_named
from internvl_jax.convert.formats import About, Files
from internvl_jax.convert.from_torch import WeightsError
from internvl_jax.convert.plain_card import card
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig

FORMAT, VERSION = "internvl_jax.plain", 1
PACKAGE = "internvl_torch"
TOKENIZER = "tokenizer.model"
KINDS: dict[type, str] = {
    VitConfig: "vit",
    LlamaConfig: "decoder",
    InternVLConfig: "internvl",
    ChatConfig: "chat",
}
# What only training asks for.
TRAINING = (
    "drop_path",
    "drop_path_mode",
    "layer_scale",
    "logit_scale",
    "logit_bias",
    "pad_id",
    "lora",
)
RESIZES = {"square": "squash", "center": "crop", "pad": "pad"}
LENGTHS = {InternVLConfig: 80, ChatConfig: 2048, LlamaConfig: 2048}
GENERATION: dict[type, dict[str, Any]] = {
    # The paper's captions (their shortest length is a matter of the data).
    InternVLConfig: {"max_new_tokens": 30, "num_beams": 5},
    ChatConfig: {"max_new_tokens": 512},
    LlamaConfig: {"max_new_tokens": 512},
}
REQUIREMENTS = """\
# Serving this folder. Any build of torch will do: CPU, CUDA or another; tested with 2.13.
torch>=2.6
safetensors>=0.4.5
numpy>=1.26
# Only for texts, and only for picture files:
sentencepiece>=0.2
pillow>=10.3
# Only for the server (python -m internvl_torch.server):
# fastapi>=0.115
# uvicorn>=0.30
"""


def files(about: About) -> Files:
    """What lies beside the weights of the ``plain`` form.

    Args:
        about: the model.

    Returns:
        ``config.json``, the code under ``internvl_torch/``, ``requirements.txt``, ``LICENSE``,
        ``README.md``, and the tokenizer where there is one.

    Raises:
        WeightsError: if the tokenizer is not the model's.
    """
    described = config(about)
    root = Path(__file__).parent / "runtime"
    code: Files = {
        f"{PACKAGE}/{path.relative_to(root).as_posix()}": path
        for path in sorted(root.rglob("*.py"))
    }
    content: Files = {
        "config.json": (json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode(),
        "requirements.txt": REQUIREMENTS.encode(),
        "LICENSE": _license(),
        "README.md": card(about, described).encode(),
    }
    if about.tokenizer is not None:
        content[about.tokenizer.name] = about.tokenizer
    if (text := described["text"]) is not None and text["tokenizer"] is not None:
        assert about.tokenizer is not None
        del content[about.tokenizer.name]
        content[TOKENIZER] = about.tokenizer
    return {**content, **code}


def config(about: About) -> dict[str, Any]:
    """The ``config.json`` that `runtime.config.read` reads."""
    cfg, stage, data = about.cfg, about.stage, about.data
    image = None
    if not isinstance(cfg, LlamaConfig):
        vision = cfg if isinstance(cfg, VitConfig) else cfg.vision
        image = {
            "size": stage.get("image_size", vision.image_size),
            "resize": RESIZES[data.get("resize", "square")],
            "mean": list(MEAN),
            "std": list(STD),
        }
        if not data and isinstance(cfg, ChatConfig):
            image["resize"] = "pad"  # as the released dialogue models were trained
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": KINDS[type(cfg)],
        "model": architecture(cfg),
        "image": image,
        "text": None if isinstance(cfg, VitConfig) else _text(about, cfg),
        "generation": dict(GENERATION.get(type(cfg), {})),
    }


def architecture(cfg: Any) -> dict[str, Any]:
    """A model's fields without those of training, defaults resolved."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):
        if field.name in TRAINING:
            continue
        value = getattr(cfg, field.name)
        values[field.name] = architecture(value) if dataclasses.is_dataclass(value) else value
    if isinstance(cfg, LlamaConfig):
        values |= {"kv_heads": cfg.K, "head_dim": cfg.H}
    return values


def _text(about: About, cfg: InternVLConfig | ChatConfig | LlamaConfig) -> dict[str, Any]:
    inner = {InternVLConfig: "qllama", ChatConfig: "llm"}.get(type(cfg))
    decoder: Any = cfg if inner is None else getattr(cfg, inner)
    tokenizer, pad = None, decoder.pad_id or 0
    if about.tokenizer is not None and about.tokenizer.suffix == ".model":
        from data_pipelines.text import Tokenizer

        try:
            pad = Tokenizer(about.tokenizer, vocab_size=decoder.vocab_size).pad_id
        except (ValueError, OSError) as error:
            raise WeightsError(str(error)) from None
        tokenizer = TOKENIZER
    captions = isinstance(cfg, InternVLConfig)
    languages = about.data.get("languages", ("en",) if about.data else tuple(LANGUAGES))
    template = None
    if not captions and tokenizer is not None:
        try:
            template = template_named(about.data.get("template", "vicuna_v1"))
        except ValueError as error:
            raise WeightsError(str(error)) from None
    shown = ("system", "user", "assistant", "roles")
    return {
        "tokenizer": tokenizer,
        "length": about.stage.get("text_length", LENGTHS[type(cfg)]),
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": pad,
        "prefix": SUMMARIZE if captions else "",
        "prompts": {code: caption_prompt(code) for code in languages} if captions else {},
        "template": template and {name: getattr(template, name) for name in shown},
    }


def _license() -> bytes | Path:
    """The project's, beside the package in a checkout and in its metadata when installed."""
    checkout = Path(__file__).parents[2] / "LICENSE"
    if checkout.is_file():
        return checkout
    from importlib.metadata import PackageNotFoundError, files

    try:
        found = [f for f in files("internvl-jax") or () if f.name == "LICENSE"]
        return found[0].read_binary()
    except (PackageNotFoundError, IndexError):
        return b"Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0\n"
