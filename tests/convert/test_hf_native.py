"""A written hf-native folder is what transformers loads from disk, and computes the same there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipelines.text import train
from internvl_jax.batch import IMAGE_PLACEHOLDER, IMAGE_TOKEN, TEMPLATES, tokenize
from internvl_jax.convert import hf_native, views
from internvl_jax.convert.architectures import model_config
from internvl_jax.convert.formats import About, Files
from internvl_jax.convert.from_torch import Tensors, WeightsError, load, module
from internvl_jax.convert.key_maps import key_map
from internvl_jax.generate.prompt import chat
from internvl_jax.generate.settings import Settings
from internvl_jax.models.compute import Compute
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.tree import flatten, unflatten

SIX = VitConfig(image_size=28, patch_size=7, width=20, depth=5, heads=5, mlp_dim=33)
THREE = dataclasses.replace(SIX, depth=2, norm="layer", qk_norm=False, qkv_bias=True)
LLAMA = LlamaConfig(
    vocab_size=40, width=24, depth=2, heads=4, kv_heads=2, mlp_dim=30, eps=1e-5, rope_theta=5e4
)
QWEN2 = dataclasses.replace(LLAMA, qkv_bias=True, tied_head=True)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, head_dim=8)
MODELS = {
    "6b, layer -4, llama": ChatConfig(SIX, LLAMA, projector="mlp1", select_layer=-4),
    "300m, qwen2 tied": ChatConfig(THREE, QWEN2, projector="mlp1"),
    "6b, qwen3": ChatConfig(dataclasses.replace(SIX, depth=2), QWEN3, projector="mlp1"),
}


def written(folder: Path, cfg: ChatConfig, **about: Any) -> dict[str, np.ndarray]:
    """A folder as the exporter writes it, of random parameters; and those."""
    rng = np.random.default_rng(3)
    ours = {
        path: (rng.normal(size=leaf.shape, scale=0.2) + path.endswith("scale")).astype(np.float32)
        for path, leaf in key_map(cfg, "native").ours.items()
    }
    keys = key_map(hf_native.cut(cfg)[0], "native")
    official = {name: keys.to_official(ours, name) for name in keys.entries}
    save_file(official, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in hf_native.files(About(cfg, **about)).items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        (folder / name).write_bytes(data)
    return ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg = MODELS[name]
    ours = written(tmp_path, cfg)
    theirs, info = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[what] for what in info), info
    assert len(theirs.model.vision_tower.encoder.layer) == hf_native.cut(cfg)[1]

    rng = np.random.default_rng(5)
    images = rng.normal(size=(1, 28, 28, 3)).astype(np.float32)
    count = cfg.visual_tokens(28)
    text = np.array([[1, 5, *[IMAGE_TOKEN] * count, 7, 9, 11, 30]], np.int32)
    ids = torch.from_numpy(np.where(text == IMAGE_TOKEN, 0, text)).long()
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits.numpy()
        tokens = theirs.generate(
            input_ids=ids, pixel_values=pixels, max_new_tokens=6, do_sample=False, eos_token_id=None
        )[0, ids.shape[1] :].numpy()

    model: Any = module(cfg, unflatten(ours), Compute(dtype="float32", remat="none"))
    with jax.default_matmul_precision("highest"):
        hidden = model.hidden(jnp.asarray(images)[None], jnp.asarray(text), jnp.ones_like(text))
        logits = np.asarray(model.llm.logits(hidden))
        settings = Settings(max_new_tokens=6, eos_id=-1)
        mask = np.ones(text.shape, bool)
        found = np.asarray(chat(model, images[None], text, mask, settings))[0]
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(found, tokens)


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_is_read_back(name: str, tmp_path: Path) -> None:
    ours = written(tmp_path, MODELS[name])
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = Tensors(tmp_path)
    cfg, naming = model_config(config, tensors.shapes)
    remaining, kept = hf_native.cut(MODELS[name])
    assert naming == "native"
    assert cfg == dataclasses.replace(
        remaining,
        llm=dataclasses.replace(remaining.llm, kv_heads=2, head_dim=remaining.llm.H),
    )
    back = flatten(load(views.of(tensors, cfg, naming), cfg, naming))
    for path, leaf in back.items():
        whole = ours[path][:kept] if path.startswith("vision/blocks/") else ours[path]
        np.testing.assert_array_equal(leaf, whole, err_msg=path)


def parsed(files: Files) -> dict[str, Any]:
    content = files["config.json"]
    assert isinstance(content, bytes)
    return json.loads(content)


def test_engines_find_what_they_ask_for() -> None:
    files = hf_native.files(About(MODELS["6b, layer -4, llama"], dtype="bfloat16"))
    config = parsed(files)
    vision = config["vision_config"]
    assert vision["image_size"] == [28, 28] and vision["patch_size"] == [7, 7]
    assert vision["num_hidden_layers"] == 2 and config["vision_feature_layer"] == -1
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert config["image_seq_length"] == 4 and config["image_token_id"] == 0
    assert config["torch_dtype"] == "bfloat16" and config["model_type"] == "internvl"
    tied = parsed(hf_native.files(About(MODELS["300m, qwen2 tied"])))
    assert tied["tie_word_embeddings"] is tied["text_config"]["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (ChatConfig(SIX, LLAMA, projector="mlp1", unshuffle="v1"), "remote-code or plain"),
        (ChatConfig(SIX, LLAMA), "no place for the projector mlp2x_gelu.* as plain"),
        (ChatConfig(SIX, LLAMA, LLAMA, 2, "mlp1"), "no place for QLLaMA"),
        (SIX, "dialogue models only"),
    ],
)
def test_what_the_form_cannot_hold_is_a_sentence(cfg: Any, says: str) -> None:
    with pytest.raises(WeightsError, match=says):
        hf_native.files(About(cfg))


CONVERSATION = [
    {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\nWhat is it's colour?  "},
    {"from": "gpt", "value": " A red box. "},
    {"from": "human", "value": "And the other one?"},
    {"from": "gpt", "value": None},
]


def messages() -> list[dict[str, Any]]:
    """The same conversation as transformers has it."""
    rows: list[dict[str, Any]] = []
    for turn in CONVERSATION:
        if turn["value"] is None:
            continue
        text = turn["value"].replace(IMAGE_PLACEHOLDER, "")
        content: list[dict[str, str]] = [{"type": "text", "text": text}]
        if text != turn["value"]:
            content.insert(0, {"type": "image"})
        rows.append(
            {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": content}
        )
    return rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_have_the_ids_of_training(template: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    corpus = ["A chat between a user and an assistant. What colour is the red box?"] * 20
    corpus += [f"USER: the other {i} ASSISTANT: one, two" for i in range(50)]
    tokenizer = train(corpus, tmp_path / "tokenizer.model", vocab_size=330)
    llm = dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size)
    cfg = ChatConfig(SIX, llm, projector="mlp1")
    (tmp_path / "out").mkdir()
    written(
        tmp_path / "out",
        cfg,
        data={"template": template},
        tokenizer=tmp_path / "tokenizer.model",
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.pad_token_id != theirs.context_image_token_id == 0
    text = theirs.apply_chat_template(messages(), tokenize=False)
    text = text.replace("<unk>", "<unk>" * 4)  # as the processor does
    found = theirs(text, add_special_tokens=False).input_ids
    expected, _ = tokenize(
        TEMPLATES[template].segments(CONVERSATION),
        tokenizer.ids,
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_id,
        visual_tokens=4,
    )
    assert found == np.where(expected == IMAGE_TOKEN, 0, expected).tolist()
    if TEMPLATES[template].roles:
        asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "}]
        text = theirs.apply_chat_template(asked, tokenize=False)
        assert text == "<s>Be brief. USER: Hi ASSISTANT:"


def test_what_a_model_card_must_say() -> None:
    about = About(MODELS["6b, layer -4, llama"], stage={"image_size": 56}, data={"resize": "pad"})
    said = " ".join(hf_native.caveats(about))
    assert "first 2 layers of 5" in said and "resize='pad'" in said and "28 px" in said
    assert "id 0 (<unk>)" in said and "Nothing says which dialogue template" in said
