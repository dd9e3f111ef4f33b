"""The demo: a small InternVL through every stage on emoji pictures and their names.

``--config=configs/demo.py:STAGE`` with one of `STAGES`, or ``STAGE,fast`` for a glance. Runs live
in ``runs/demo`` or ``runs/demo_fast``; `launch.local` drives them in order. Sizes and steps suit
two CPU cores.
"""

from __future__ import annotations

from ml_collections import ConfigDict

STAGES = ("language", "contrastive", "llm", "generative", "projector", "chat")
LANGUAGES = ("en", "zh", "ja", "ar", "it")
VOCAB = 5000
QUERIES = 8
IMAGE_SIZE = 48
TEXT_LENGTH = 16
CHAT_LENGTH = 96
CHUNK = 512
"""Logits at a time: few enough to stay in a CPU's cache, three times as fast as all at once."""

STEPS = dict(language=250, contrastive=2000, llm=200, generative=550, projector=40, chat=250)
FAST_STEPS = dict(language=25, contrastive=150, llm=15, generative=40, projector=5, chat=15)

VISION = dict(
    image_size=IMAGE_SIZE,
    patch_size=8,
    width=128,
    depth=4,
    heads=4,
    mlp_dim=512,
    # Four layers need no LayerScale of 0.1 to be stable, and learn faster without.
    layer_scale=1.0,
)
TEXT = dict(
    vocab_size=VOCAB, width=128, depth=3, heads=4, mlp_dim=256, cross_frequency=1, vision_width=0
)
QLLAMA = dict(TEXT, vision_width=VISION["width"])
INTERNVL = dict(vision=VISION, embed_dim=128, pool_heads=4, logit_scale=3.0)
COMPUTE = dict(dtype="float32", remat="none", unroll=4)


def get_config(arg: str = "contrastive") -> ConfigDict:
    """Args: arg: a stage of `STAGES`, with ``,fast`` for fewer steps."""
    stage, *more = arg.split(",")
    runs = "runs/demo_fast" if more else "runs/demo"
    if stage not in STAGES or more not in ([], ["fast"]):
        raise ValueError(
            f"Unknown argument {arg!r}: use one of {', '.join(STAGES)}, or STAGE,fast."
        )
    steps = (FAST_STEPS if more else STEPS)[stage]
    config = ConfigDict()
    config.seed = 0
    config.stage = dict(compute=COMPUTE, text_length=TEXT_LENGTH, image_size=IMAGE_SIZE)
    config.mesh = dict(replica=-1, fsdp=1, tensor=1)
    config.optim = dict(
        peak_lr=1e-3, warmup=0.05, schedule="cosine", b2=0.98, weight_decay=0.1, clip_norm=1.0
    )
    config.train = dict(
        steps=steps,
        global_batch=128,
        frozen_dtype="float32",
        log_every=10,
        eval_every=max(steps // 4, 1),
        eval_batches=1,
        save_every=max(steps // 4, 1),
        keep=1,
    )
    config.data = dict(
        dataset="emoji",
        data_dir="data",
        # Trained on these five languages alone: a small vocabulary keeps the logits small.
        tokenizer=f"{runs}/tokenizer.model",
        languages=LANGUAGES,
        crop_scale=(0.6, 1.0),
        # Flags are told apart by colours that a 48 px picture hardly shows.
        skip_groups=("Flags",),
        threads=1,
    )
    globals()[f"_{stage}"](config, runs)
    return config


def _language(config: ConfigDict, runs: str) -> None:
    """Stage 0 of QLLaMA's decoder."""
    config.stage.update(name="language", model=TEXT, chunk=CHUNK)
    config.optim.peak_lr = 2e-3
    config.train.global_batch = 64


def _llm(config: ConfigDict, runs: str) -> None:
    """Stage 0 of the dialogue model's LLM, which starts from the text tower of stage 1.

    A pretrained LLM knows what the same thing is called in other languages; here only the pictures
    taught that.
    """
    config.stage.update(name="language", model=TEXT, text_length=CHAT_LENGTH, chunk=CHUNK)
    config.optim.peak_lr = 1e-3
    config.train.global_batch = 32
    config.data.update(texts=("dialogue",), max_questions=3)
    config.init = dict(
        sources=(dict(path=f"{runs}/contrastive", rename=(("qllama", "llm"),)),),
        dropped_ok=(r"vision/.*", r"clip_projector/.*", r"text_projection", r"logit_scale"),
    )


def _contrastive(config: ConfigDict, runs: str) -> None:
    """Stage 1: most patches masked, then a last part unmasked, as the paper does with half."""
    steps = config.train.steps
    config.stage.update(name="contrastive", model=dict(INTERNVL, qllama=TEXT, queries=0))
    config.phases = (
        dict(until=round(steps * 0.93), stage=dict(keep=1 / 3)),
        dict(until=steps, stage=dict(keep=1.0)),
    )
    # LLaMA reads a caption as well without "summarize:", as stage 2's matching does; a tower that
    # never read anything else has to see both.
    config.data.prefix_share = 0.5
    config.init = dict(
        sources=(dict(path=f"{runs}/language", rename=(("llm", "qllama"),)),),
        new_ok=(r"vision/.*", r"clip_projector/.*", r"text_projection", r"logit_scale"),
    )


def _generative(config: ConfigDict, runs: str) -> None:
    """Stage 2: the queries learn to read the frozen tower, and the output head to write again."""
    config.stage.update(
        name="generative",
        model=dict(INTERNVL, qllama=QLLAMA, queries=QUERIES),
        chunk=CHUNK,
        # The paper's, and QLLaMA's output head: stage 1 leaves little of the language model that
        # the head was trained for. The original's decoder learns ten times slower there.
        trainable_paths=(
            "query_tokens",
            ".*/cross/",
            "clip_projector2/",
            "itm_",
            "logit_scale",
            "qllama/lm_head",
        ),
        # At 1 : 1 : 1 a few hundred steps leave matching at chance: it learns last.
        loss_weights=(10.0, 2.0, 1.0),
    )
    config.optim.peak_lr = 2e-3
    config.train.global_batch = 64
    config.data.keyword_share = 0.1
    config.init = dict(
        sources=(dict(path=f"{runs}/contrastive"),),
        new_ok=(r"query_tokens", r".*/cross/.*", r"clip_projector2/.*", r"itm_.*"),
    )


def _chat(config: ConfigDict, runs: str) -> None:
    """Stage 3, second step: projectors and LLM, from the first step."""
    _finetune(config, runs)
    config.init = dict(sources=(dict(path=f"{runs}/projector"),))


def _projector(config: ConfigDict, runs: str) -> None:
    """Stage 3, first step: only the projectors, from stage 2 and the LLM of stage 0."""
    _finetune(config, runs)
    config.stage.trainable_paths = ("projector/", "query_projector/")
    config.init = dict(
        sources=(dict(path=f"{runs}/generative"), dict(path=f"{runs}/llm")),
        new_ok=(r"projector/.*", r"query_projector/.*"),
        dropped_ok=(r"clip_projector2?/.*", r"itm_.*", r"text_projection", r"logit_scale"),
    )


def _finetune(config: ConfigDict, runs: str) -> None:
    """Queries and unshuffled patches (``mlp1``) together into a small LLM."""
    config.stage.update(
        name="finetune",
        model=dict(vision=VISION, qllama=QLLAMA, queries=QUERIES, llm=TEXT, projector="mlp1"),
        text_length=CHAT_LENGTH,
        chunk=CHUNK,
    )
    config.optim.update(peak_lr=1e-3, weight_decay=0.0)
    config.train.global_batch = 32
    config.data.update(max_questions=3, questions=("which", "which", "is", "what", "language"))
