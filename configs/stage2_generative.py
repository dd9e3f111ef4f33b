"""Stage 2, vision-language generative training (https://arxiv.org/abs/2312.14238, Table 20).

QLLaMA's queries and cross-attention learn to read the frozen tower: ITC + ITM + ITG on 1.6 B
samples in batches of 20 K. Arguments: empty for the full size, ``tiny``, ``retrieval`` for the
fine-tuning of Table 21 (364 px, layer-wise decay, soft targets), ``lora`` to fine-tune a finished
InternVL-G with adapters, and a slice such as ``v5p_4x4x8``, or with ``lora`` one chip, ``v6e_1x1``.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import lora, mixtures, tiny, topologies

TRAIN_QUERIES = ("query_tokens", ".*/cross/", "clip_projector2/", "itm_", "logit_scale")
TRAIN_ALL = ("(?!qllama/lm_head)",)  # everything that the retrieval loss reaches
TRAIN_HEADS = ("query_tokens", "clip_projector2/", "itm_", "logit_scale")
STEPS = 80_000
BATCH = 20_480

# What each slice has the memory for: see `topologies.apply` and docs/planning.md.
TOPOLOGIES = {
    "v5p_4x4x8": dict(fsdp=64, remat="qllama/gate:12"),
    "v5e_16x16": dict(fsdp=128, remat="layer@host"),
    "v6e_16x16": dict(fsdp=128, remat="layer@host"),
}
ONE_CHIP = {"v6e_1x1": dict(fsdp=1, remat="full", accumulate=256, layout="auto")}  # with ``lora``


def get_config(arg: str = "") -> ConfigDict:
    """Args: arg: empty or a list of ``tiny``, ``retrieval``, ``lora`` and a slice."""
    arguments = [a for a in arg.split(",") if a]
    slices = {**TOPOLOGIES, **(ONE_CHIP if "lora" in arguments else {})}
    if unknown := set(arguments) - {"tiny", "retrieval", "lora", *slices}:
        raise ValueError(
            f"Unknown argument {sorted(unknown)[0]!r}: use tiny, retrieval, lora or "
            f"{', '.join(slices)}."
        )
    config = ConfigDict()
    config.seed = 0
    config.stage = dict(
        name="generative",
        variant="pretrain",
        image_size=224,
        text_length=80,
        trainable_paths=TRAIN_QUERIES,
        hard_negatives=False,
        label_smoothing=0.0,
        layer_decay=1.0,
        chunk=4096,
        compute=dict(dtype="bfloat16", remat="full", head_multiple=1),
        model=dict(
            vision=dict(
                image_size=224, patch_size=14, width=3200, depth=48, heads=25, mlp_dim=12800
            ),
            qllama=dict(
                vocab_size=49954,
                width=4096,
                depth=32,
                heads=32,
                mlp_dim=11008,
                cross_frequency=2,
                vision_width=3200,
                pad_id=0,
            ),
            queries=96,
            embed_dim=768,
            pool_heads=16,
        ),
    )
    config.mesh = dict(replica=1, fsdp=-1, tensor=1)
    config.optim = dict(
        peak_lr=5e-5,
        warmup=2000.0,
        schedule="cosine",
        end_lr=0.0,
        b1=0.9,
        b2=0.98,
        weight_decay=0.05,
        no_decay=(r"bias$", r"scale$", r"/ls[12]$"),
        clip_norm=0.0,
    )
    config.train = dict(
        steps=STEPS,
        global_batch=BATCH,
        accumulate=1,
        frozen_dtype="bfloat16",
        log_every=10,
        eval_every=1000,
        eval_batches=1,
        save_every=1000,
        keep=3,
        keep_every=20_000,
    )
    config.init = dict(
        sources=(dict(path="runs/stage1"),),
        new_ok=(r"query_tokens", r".*/cross/.*", r"clip_projector2/.*", r"itm_.*"),
    )
    config.data = dict(
        dataset="",
        mixture=mixtures.mixture("data/stage2", mixtures.PAIRS),
        order="window",
        lanes=512,
        tokenizer="data/tokenizer.model",
        crop_scale=(0.5, 1.0),
        threads=16,
    )
    if "retrieval" in arguments:
        _retrieval(config)
    if "lora" in arguments:
        _lora(config)
    for name in sorted(set(arguments) & set(slices)):
        topologies.apply(config, name, slices[name])
    if "tiny" in arguments:
        _tiny(config)
    return config


def _retrieval(config: ConfigDict) -> None:
    """Table 21: everything trained at 364 px, batch 1,024, 10 epochs of Flickr30K."""
    config.stage.update(
        variant="retrieval", image_size=364, trainable_paths=TRAIN_ALL, layer_decay=0.9
    )
    config.stage.model.vision.update(image_size=364, drop_path=0.3, drop_path_mode="linear")
    config.optim.update(peak_lr=1e-6, warmup=100.0, b2=0.999)
    config.train.update(
        steps=10 * 29_000 // 1024, global_batch=1024, eval_every=100, save_every=100
    )
    config.init = dict(sources=(dict(path="runs/stage2"),))
    config.data = dict(
        dataset="data/flickr30k", tokenizer="data/tokenizer.model", crop_scale=(0.5, 1.0), flip=0.5
    )


def _lora(config: ConfigDict) -> None:
    """Adapters everywhere and the small heads; the queries' cross-attention is pretrained by now.

    Rates and lengths are ours: the released scripts have them per data set.
    """
    heads = TRAIN_HEADS
    if config.stage.variant == "pretrain":
        config.train.update(steps=10_000, global_batch=1024)
    else:
        heads = (*heads, "clip_projector/")  # which the pre-training loss does not reach
    config.init = dict(sources=(dict(path="runs/stage2"),))
    lora.apply(config, ("vision", "qllama"), heads)
    config.stage.layer_decay = 1.0
    config.optim.update(peak_lr=1e-4, warmup=0.03)


def _tiny(config: ConfigDict) -> None:
    vision = dict(config.stage.model.vision.items())
    config.stage.update(image_size=32, text_length=24, chunk=64, compute=tiny.COMPUTE)
    config.stage.model.update(qllama=tiny.QLLAMA, queries=4, embed_dim=32, pool_heads=4)
    config.stage.model.vision = {**vision, **tiny.VISION}
    config.optim.update(peak_lr=1e-3, warmup=2.0)
    config.train.update(tiny.train())
    config.init = dict()
    config.data = {**tiny.DATA, "flip": config.data.get("flip", 0.0)}
