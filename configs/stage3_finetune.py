"""Stage 3, supervised fine-tuning of a dialogue model (https://arxiv.org/abs/2312.14238, 3.3).

Arguments, joined by commas: ``mlp`` (the first step: only the projector) or ``sft`` (the second:
projector and LLM, the default); ``vit`` (InternViT through ``mlp2x_gelu``, LLaVA-1.5's recipe, the
default) or ``qllama`` (QLLaMA and ``two_mlp``); ``7b`` (default) or ``13b``, or ``2b``: InternViT-
300M, ``mlp1`` and Qwen2.5-1.5B, InternVL3-2B's sizes; ``lora`` to train adapters in the LLM's
place; ``tiny``; a slice such as ``v5p_4x4x8``, or with ``lora`` one chip such as ``v6e_1x1``.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import lora, mixtures, tiny, topologies

TRAIN_MLP = ("projector/", "query_projector/")
TRAIN_MLP_AND_LLM = (*TRAIN_MLP, "llm/")
LLMS = {
    "7b": dict(vocab_size=32000, width=4096, depth=32, heads=32, mlp_dim=11008, eps=1e-5),
    "13b": dict(vocab_size=32000, width=5120, depth=40, heads=40, mlp_dim=13824, eps=1e-5),
    "2b": dict(
        vocab_size=151674,
        width=1536,
        depth=28,
        heads=12,
        kv_heads=2,
        mlp_dim=8960,
        eps=1e-6,
        rope_theta=1e6,
        qkv_bias=True,
    ),
}
VIT_300M = dict(
    image_size=448,
    width=1024,
    depth=24,
    heads=16,
    mlp_dim=4096,
    norm="layer",
    qk_norm=False,
    qkv_bias=True,
)
# What each slice has the memory for: see `topologies.apply` and docs/planning.md.
TOPOLOGIES = {
    "v5p_4x4x8": dict(fsdp=64, remat="gate,up"),
    "v5e_16x16": dict(fsdp=128, remat="full"),
    "v6e_16x16": dict(fsdp=128, remat="gate,llm/weights:20"),
}
# With ``lora``: what one chip has the memory for, by the size of the LLM.
ONE_CHIP = {
    "7b": {"v6e_1x1": dict(fsdp=1, remat="gate", accumulate=128, layout="auto")},
    "2b": {
        "v5e_1x1": dict(fsdp=1, remat="gate,up", accumulate=64, layout="auto"),
        "v6e_1x1": dict(fsdp=1, remat="gate,up", accumulate=32, layout="auto"),
    },
}
QLLAMA = dict(
    vocab_size=49954,
    width=4096,
    depth=32,
    heads=32,
    mlp_dim=11008,
    cross_frequency=2,
    vision_width=3200,
    pad_id=0,
)


def get_config(arg: str = "") -> ConfigDict:
    """Args: arg: see the module."""
    arguments = {a for a in arg.split(",") if a}
    size = next((s for s in ("2b", "13b") if s in arguments), "7b")
    slices = {**TOPOLOGIES, **(ONE_CHIP.get(size, {}) if "lora" in arguments else {})}
    known = {"mlp", "sft", "vit", "qllama", *LLMS, "lora", "tiny", *slices}
    if unknown := arguments - known:
        raise ValueError(
            f"Unknown argument {sorted(unknown)[0]!r}: use mlp or sft, vit or qllama, 7b, 13b or "
            f"2b, lora, tiny, {', '.join(slices)}."
        )
    if {"2b", "qllama"} <= arguments:
        raise ValueError("QLLaMA reads InternViT-6B, which 2b has not: leave one of them out.")
    first = "mlp" in arguments
    config = ConfigDict()
    config.seed = 0
    config.stage = dict(
        name="finetune",
        image_size=336,
        text_length=2048,
        image_slots=1,
        trainable_paths=TRAIN_MLP if first else TRAIN_MLP_AND_LLM,
        chunk=4096,
        compute=dict(dtype="bfloat16", remat="full", head_multiple=1),
        model=dict(
            vision=dict(
                image_size=336, patch_size=14, width=3200, depth=48, heads=25, mlp_dim=12800
            ),
            llm=LLMS[size],
            projector="mlp2x_gelu",
            select_layer=-4,
        ),
    )
    config.mesh = dict(replica=1, fsdp=-1, tensor=1)
    config.optim = dict(
        peak_lr=1e-3 if first else 2e-5,
        warmup=0.03,
        schedule="cosine",
        end_lr=0.0,
        b1=0.9,
        b2=0.999,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    samples, batch = (558_000, 256) if first else (665_000, 128)
    config.train = dict(
        steps=samples // batch,
        global_batch=batch,
        accumulate=1,
        frozen_dtype="bfloat16",
        log_every=10,
        eval_every=500,
        eval_batches=2,
        save_every=500,
        keep=2,
    )
    tower = (r"clip_projector2?/.*", r"itm_.*", r"text_projection", r"logit_scale")
    config.init = dict(
        sources=(
            dict(path="runs/stage2"),
            dict(path="checkpoints/vicuna"),
        ),
        new_ok=(r"projector/.*", r"query_projector/.*"),
        dropped_ok=(*tower, r"qllama/.*", r"query_tokens"),
    )
    if not first:
        config.init = dict(sources=(dict(path="runs/stage3_mlp"),))
    if size == "2b":
        config.stage.update(image_size=448)
        config.stage.model.vision.update(VIT_300M)
        config.stage.model.update(projector="mlp1", select_layer=-1)
        if not first:
            config.init = dict(sources=(dict(path="checkpoints/internvl3_2b"),))
    if "qllama" in arguments:
        config.stage.model.update(qllama=QLLAMA, queries=96)
        config.train.update(steps=4_000_000 // 512, global_batch=512)
        if first:
            config.init.dropped_ok = tower
    config.data = dict(
        dataset="data/stage3/pretrain558k" if first else "",
        tokenizer="data/vicuna/tokenizer.model",
        template="plain" if first else "vicuna_v1",
        # A crop could cut off what is asked for, and would move boxes.
        crop_scale=(),
        resize="pad",
        threads=16,
    )
    if not first:
        names = mixtures.INSTRUCTIONS if "qllama" in arguments else mixtures.LLAVA
        config.data.mixture = mixtures.mixture("data/stage3", names)
    if "lora" in arguments:
        lora.apply(config, ("llm",), TRAIN_MLP)
        # LLaVA-1.5's: 2e-4 for adapters, and 2e-5 for a projector that is trained already.
        config.stage.lr_scales = ((r".*_lora/", 0.2),) if first else ((r".*projector/", 0.1),)
        config.optim.peak_lr = 1e-3 if first else 2e-4
    for name in sorted(arguments & set(slices)):
        topologies.apply(config, name, slices[name])
    if "tiny" in arguments:
        _tiny(config)
    return config


def _tiny(config: ConfigDict) -> None:
    config.stage.update(image_size=32, text_length=192, chunk=256, compute=tiny.COMPUTE)
    config.stage.model.update(vision=tiny.VISION, llm=tiny.LLM, select_layer=-1)
    if "qllama" in config.stage.model:
        config.stage.model.update(qllama=tiny.QLLAMA, queries=4)
    config.optim.update(peak_lr=1e-3, warmup=2.0)
    config.train.update(tiny.train(global_batch=8))
    config.init = dict()
    config.data = {**tiny.DATA, "template": config.data.template}
