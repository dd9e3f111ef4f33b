"""The model card of an export: what it is, where it comes from, how to check and load it."""

from __future__ import annotations

from internvl_jax.convert.formats import About
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig

LOADING = {
    "official": "Tensors have the names of the released InternVL-14B and InternViT folders. Code "
    "that reads those reads this one; a stage-1 model fills the part that it has.",
    "stage1": "Tensors have the names of the released plain stage-1 file "
    "(`internvl_c_13b_224px.pth`), which has no place for an output head.",
    "hf-native": "`transformers` (5.23 or newer) loads it without remote code:\n\n"
    "```python\n"
    "from transformers import AutoProcessor, InternVLForConditionalGeneration\n\n"
    'model = InternVLForConditionalGeneration.from_pretrained("THIS_FOLDER", dtype="auto")\n'
    "```\n\n"
    "vLLM and LMDeploy read the same folder.",
    "remote-code": "Tensors and config have the spelling of `InternVLChatModel`. The Python files "
    "that define that class are not part of this folder.",
}


def card(about: About, format: str, tensors: int, caveats: tuple[str, ...]) -> bytes:
    """A README.md.

    Args:
        about: what is known of the model.
        format: of `formats.FORMATS`.
        tensors: how many there are.
        caveats: what whoever uses the folder must know.
    """
    cfg = about.cfg
    kind = {
        InternVLConfig: "InternVL (image and text towers in one space)",
        ChatConfig: "InternVL-Chat (a dialogue model that sees)",
        VitConfig: "InternViT (a vision tower)",
    }.get(type(cfg), "a decoder of the LLaMA family")
    lines = [
        f"# {kind}",
        "",
        about.origin or "Exported by internvl_jax.",
        "",
        f"- format: `{format}`",
        f"- {tensors:,} tensors, {cfg.param_count():,} parameters, {about.dtype}"
        + (" (scalars float32)" if about.dtype != "float32" else ""),
        "- `sha256sum -c checksums.sha256` compares every file with what was written",
        "",
        LOADING.get(format, ""),
        "",
        *(f"- {sentence}" for sentence in caveats),
    ]
    return ("\n".join(lines).rstrip() + "\n").encode()
