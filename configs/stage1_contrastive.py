"""Stage 1, vision-language contrastive training (https://arxiv.org/abs/2312.14238, Table 20).

InternViT-6B and multilingual LLaMA-7B, both trained, on 28.7 B samples in batches of 164 K: 196 px
with half of the image tokens dropped, then 0.5 B samples at 224 px unmasked. One 16 x 16 position
table throughout: the first phase interpolates it down.

Ours, where the paper gives none: min learning rate 0, no clipping, no clamp on the temperature, no
weight decay on norms, biases, LayerScale and temperature, crop scale 0.5-1.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import mixtures, tiny, topologies

STEPS = 175_000
BATCH = 163_840
UNMASKED = 500_000_000 // BATCH

# What each slice has the memory for: see `topologies.apply` and docs/planning.md.
TOPOLOGIES = {
    "v5p_4x4x8": dict(fsdp=64, remat="layer@host,gate:24"),
    "v5p_8x8x8": dict(fsdp=128, remat="fc1,gate,up:30", phases=("", "gate,up")),
    "v5p_8x8x16": dict(fsdp=128, remat="fc1,gate,up,qkv"),
    "v5p_2x8x8x8": dict(fsdp=128, remat="fc1,gate,up,qkv"),
    "v5p_4x8x8x8": dict(fsdp=128, remat="fc1,gate,up,qkv,mid"),
    "v4_8x8x16": dict(fsdp=128, remat="layer@host,fc1"),
    "v5e_16x16": dict(fsdp=128, remat="layer@host"),
    "v6e_16x16": dict(fsdp=128, remat="layer@host"),
}


def get_config(arg: str = "") -> ConfigDict:
    """Args: arg: empty for the full size; a slice of `TOPOLOGIES`; ``colab`` for what one v5e or
    v6e chip holds; ``tiny`` for the tests' form.
    """
    config = ConfigDict()
    config.seed = 0
    config.stage = dict(
        name="contrastive",
        image_size=196,
        keep=0.5,
        text_length=80,
        objective="softmax",
        label_smoothing=0.0,
        chunk=4096,
        # The text tower learns ten times slower than the vision tower.
        lr_scales=((r"qllama/", 0.1),),
        compute=dict(dtype="bfloat16", remat="full", head_multiple=1),
        model=dict(
            vision=dict(
                image_size=224,
                patch_size=14,
                width=3200,
                depth=48,
                heads=25,
                mlp_dim=12800,
                drop_path=0.2,
                drop_path_mode="uniform",
            ),
            qllama=dict(
                vocab_size=49954,
                width=4096,
                depth=32,
                heads=32,
                mlp_dim=11008,
                cross_frequency=2,
                vision_width=0,
                pad_id=0,
            ),
            queries=0,
            embed_dim=768,
            pool_heads=16,
        ),
    )
    config.phases = (
        dict(until=STEPS - UNMASKED, stage=dict(image_size=196, keep=0.5)),
        dict(until=STEPS, stage=dict(image_size=224, keep=1.0)),
    )
    config.mesh = dict(replica=1, fsdp=-1, tensor=1)
    config.optim = dict(
        peak_lr=1e-3,
        warmup=5000.0,
        schedule="cosine",
        end_lr=0.0,
        b1=0.9,
        b2=0.95,
        weight_decay=0.1,
        no_decay=(r"bias$", r"scale$", r"/ls[12]$", r"logit_bias$"),
        clip_norm=0.0,
        spike_factor=0.0,
    )
    config.train = dict(
        steps=STEPS,
        global_batch=BATCH,
        accumulate=1,
        grad_cache=False,
        frozen_dtype="bfloat16",
        log_every=10,
        eval_every=1000,
        eval_batches=1,
        save_every=1000,
        keep=3,
        keep_every=25_000,
    )
    # Chinese-LLaMA/Alpaca's decoder, imported into a checkpoint; the vision tower is random.
    config.init = dict(sources=(dict(path="checkpoints/chinese_alpaca_7b"),))
    config.init.new_ok = (r"vision/.*", r"clip_projector/.*", r"text_projection", r"logit_scale")
    config.data = dict(
        dataset="",
        mixture=mixtures.mixture("data/stage1", mixtures.PAIRS),
        order="window",
        lanes=512,
        tokenizer="data/tokenizer.model",
        crop_scale=(0.5, 1.0),
        threads=16,
    )
    if arg == "tiny":
        _tiny(config)
    elif arg == "colab":
        _colab(config)
    elif arg in TOPOLOGIES:
        topologies.apply(config, arg, TOPOLOGIES[arg])
    elif arg:
        raise ValueError(f"Unknown argument {arg!r}: use tiny, colab or {', '.join(TOPOLOGIES)}.")
    return config


def _colab(config: ConfigDict) -> None:
    """One chip with 16 GiB: InternViT-300M's tower and a text tower of 12 layers."""
    config.stage.model.update(
        vision=dict(
            image_size=224,
            patch_size=14,
            width=1024,
            depth=24,
            heads=16,
            mlp_dim=4096,
            norm="layer",
            qk_norm=False,
            qkv_bias=True,
            drop_path=0.1,
            drop_path_mode="linear",
        ),
        qllama=dict(
            vocab_size=49954,
            width=512,
            depth=12,
            heads=8,
            mlp_dim=1408,
            cross_frequency=2,
            vision_width=0,
            pad_id=0,
        ),
        embed_dim=512,
    )
    config.stage.lr_scales = ()
    steps = 20_000
    config.phases = (
        dict(until=steps - 1000, stage=dict(image_size=196, keep=0.5)),
        dict(until=steps, stage=dict(image_size=224, keep=1.0)),
    )
    config.optim.warmup = 1000.0
    config.train.update(steps=steps, global_batch=256, keep_every=0)
    config.data.update(order="global", lanes=1, threads=2)
    config.init = dict()
    config.topology = "v5e:1x1"


def _tiny(config: ConfigDict) -> None:
    config.stage.update(image_size=24, text_length=16, chunk=8, compute=tiny.COMPUTE)
    config.stage.model.update(
        vision=dict(tiny.VISION, drop_path=0.2), qllama=tiny.TEXT, embed_dim=32, pool_heads=4
    )
    config.phases = (
        dict(until=14, stage=dict(image_size=24, keep=0.5)),
        dict(until=20, stage=dict(image_size=32, keep=1.0)),
    )
    config.optim.update(warmup=2.0)
    config.train.update(tiny.train())
    config.init = dict()
    config.data = tiny.DATA
