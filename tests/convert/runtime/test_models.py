"""The runtime's models are ours: features, logits, hidden states, in every option."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.batch import IMAGE_TOKEN
from internvl_jax.models.intern_vit import VitConfig, normalize_images
from internvl_jax.models.internvl import InternVLConfig, unit
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.models.qllama import causal_mask, positions_of

torch = pytest.importorskip("torch")

from tests.convert.runtime.conftest import (  # noqa: E402
    LAYER_VIT,
    LLAMA,
    QLLAMA,
    QWEN,
    QWEN3,
    VIT,
    close,
)

RNG = np.random.default_rng(1)


def pictures(count: int, size: int = 28) -> np.ndarray:
    return RNG.normal(size=(count, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize("cfg", [VIT, LAYER_VIT], ids=["rms", "layer"])
@pytest.mark.parametrize("size", [(28, 28), (42, 42), (21, 35)], ids=str)
def test_vision_tower(cfg: VitConfig, size: tuple[int, int], exported: Callable) -> None:
    pair = exported(cfg)
    images = RNG.normal(size=(2, *size, 3)).astype(np.float32)
    expected = jax.jit(lambda x: pair.ours(x, taps=(-4,)))(images)
    model = pair.theirs()
    tokens, tapped = model(torch.tensor(images), -4)
    close(tokens, expected.tokens)
    close(tapped, expected.taps[0])
    early, again = model(torch.tensor(images), -4, last=False)
    close(early, expected.taps[0])
    close(again, expected.taps[0])


@pytest.mark.parametrize("cfg", [LLAMA, QWEN, QWEN3], ids=["llama", "qwen2", "qwen3"])
def test_decoder(cfg: LlamaConfig, exported: Callable) -> None:
    pair = exported(cfg)
    ids = RNG.integers(0, cfg.vocab_size, (3, 7))
    mask = np.arange(7) >= np.array([[0], [2], [6]])

    @jax.jit
    def forward(ids: Any, mask: Any) -> jax.Array:
        hidden = pair.ours(pair.ours.embed(ids), positions_of(mask), causal_mask(mask)).hidden
        return pair.ours.logits(hidden)

    from internvl_jax.convert.runtime.generate import start

    model = pair.theirs()
    for given in (mask, np.ones_like(mask)):
        expected = forward(jnp.asarray(ids), jnp.asarray(given))
        begun = start(model, model.embed(torch.tensor(ids)), torch.tensor(given))
        close(begun.logits, expected[:, -1])


def internvl(**changes: Any) -> InternVLConfig:
    given: dict[str, Any] = dict(vision=VIT, qllama=QLLAMA, queries=3, embed_dim=8, pool_heads=2)
    return InternVLConfig(**{**given, **changes})


GROUPED = dataclasses.replace(QLLAMA, kv_heads=2, head_dim=6, tied_head=True, cross_frequency=3)
STAGE1 = dataclasses.replace(QLLAMA, vision_width=0, head=False)


@pytest.mark.parametrize(
    "cfg",
    [
        internvl(),
        internvl(vision=LAYER_VIT, qllama=GROUPED, queries=5),
        internvl(queries=0, qllama=STAGE1),
    ],
    ids=["g", "grouped", "c"],
)
def test_internvl(cfg: InternVLConfig, exported: Callable) -> None:
    pair = exported(cfg)
    images, text = pictures(2), RNG.integers(1, 60, (4, 6))
    mask = np.arange(6) < np.array([[6], [3], [2], [5]])
    text = np.where(mask, text, 0)
    modes = ("C", "G") if cfg.queries else ("C",)

    @jax.jit
    def forward(images: Any, text: Any, mask: Any) -> dict[str, jax.Array]:
        ours = pair.ours
        vision = ours.image_tokens(images)
        found = {f"logits {m}": ours(images, text, mask, m) for m in modes}
        found |= {f"image {m}": ours.image_embedding(vision, m) for m in modes}
        found["text"] = ours.text_embedding(text, mask)
        if cfg.queries:
            found["queries"] = ours.query_states(vision)
            found["match"] = ours.matching_score(vision, text, mask)
        return found

    expected = forward(images, jnp.asarray(text), jnp.asarray(mask))
    model = pair.theirs()
    vision, ids = model.image_tokens(torch.tensor(images)), torch.tensor(text)
    embedded = model.text_embedding(ids, torch.tensor(mask.sum(1)))
    close(embedded, expected["text"])
    for mode in modes:
        image = model.image_embedding(vision, mode)
        close(image, expected[f"image {mode}"])
        close(model.similarity(image, embedded), expected[f"logits {mode}"])
    if cfg.queries:
        close(model.query_states(vision), expected["queries"])
        close(model.match_logits(vision, ids, torch.tensor(mask)), expected["match"])


def dialogue(**changes: Any) -> ChatConfig:
    return ChatConfig(**{"vision": VIT, "llm": LLAMA, **changes})


CHATS = {
    "mlp2x": dialogue(select_layer=-4),
    "mlp1 v1": dialogue(projector="mlp1", unshuffle="v1", llm=QWEN),
    "mlp1 v2": dialogue(projector="mlp1", select_layer=-2, llm=QWEN3, vision=LAYER_VIT),
    "two": dialogue(qllama=QLLAMA, queries=3, select_layer=-4),
    "queries": dialogue(qllama=QLLAMA, queries=3, projector="none"),
    "queries mlp1": dialogue(qllama=GROUPED, queries=2, projector="mlp1"),
}


@pytest.mark.parametrize("cfg", CHATS.values(), ids=CHATS)
def test_chat(cfg: ChatConfig, exported: Callable) -> None:
    pair, images = exported(cfg), pictures(3)
    V = cfg.visual_tokens(28)
    expected = jax.jit(pair.ours.visual_embeddings)(images)
    model = pair.theirs()
    visual = model.visual_embeddings(torch.tensor(images))
    assert visual.shape == (3, V, 16)
    close(visual, expected)

    shown = [IMAGE_TOKEN] * V
    rows = [[1, *shown, 5, *shown, 6], [1, 7, 8, *shown]]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows], np.int32)
    slots = np.asarray(expected)[[0, 1, 2, 2]].reshape(2, 2 * V, -1)  # the last one is spare
    found = model.splice(torch.tensor(ids), visual)
    close(found, jax.jit(pair.ours.splice)(jnp.asarray(ids), jnp.asarray(slots)))


def test_other_sizes_than_the_table(exported: Callable) -> None:
    pair, images = exported(CHATS["mlp1 v2"]), pictures(2, 56)
    expected = jax.jit(pair.ours.visual_embeddings)(images)
    assert expected.shape[1] == pair.cfg.visual_tokens(56)
    close(pair.theirs().visual_embeddings(torch.tensor(images)), expected)


def test_bfloat16_features_point_the_same_way(exported: Callable) -> None:
    """The stated policy: cosine of bfloat16 features to float32's above 0.999."""
    pair = exported(internvl(qllama=dataclasses.replace(QLLAMA, width=64, mlp_dim=96)))
    exact, rounded = pair.theirs(), pair.theirs(dtype="bfloat16")
    images = torch.tensor(pictures(8))
    ids, lengths = torch.tensor(RNG.integers(1, 60, (8, 6))), torch.full((8,), 6)
    for mode in ("C", "G"):
        both = [unit_(m.image_embedding(m.image_tokens(images), mode)) for m in (exact, rounded)]
        assert float((both[0] * both[1]).sum(-1).min()) > 0.999
    both = [unit_(m.text_embedding(ids, lengths)) for m in (exact, rounded)]
    assert float((both[0] * both[1]).sum(-1).min()) > 0.999
    assert next(rounded.parameters()).dtype == torch.bfloat16


def unit_(x: Any) -> Any:
    return torch.tensor(np.asarray(unit(jnp.asarray(x.float().numpy()))))


def test_pixels_are_normalised_alike() -> None:
    from internvl_jax.convert.runtime.config import ImageConfig
    from internvl_jax.convert.runtime.image import normalize

    pixels = RNG.integers(0, 256, (2, 5, 5, 3), np.uint8)
    config = ImageConfig(5, "squash", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    close(normalize(torch.tensor(pixels), config), normalize_images(pixels), 1e-6)
