"""What should fit and how close to the machine's limit: the rows of ``make plan``.

``python -m internvl_jax.plan --config=configs/plan.py`` plans them all: per row a configuration, a
phase of its run, further settings, and the bound A that it should reach. `configs/plan.py:scaling`
is stage 1 on 64 to 4,096 chips at one batch per chip.
"""

from __future__ import annotations

import math
from typing import Any

from ml_collections import ConfigDict

STAGE1 = "configs/stage1_contrastive.py"
STAGE2 = "configs/stage2_generative.py"
STAGE3 = "configs/stage3_finetune.py:sft,qllama,13b"
LORA = "configs/stage3_finetune.py"


SCALING = ("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")


def row(
    name: str, config: str, target: float, phase: int = 0, topology: str = "", **settings: Any
) -> dict[str, Any]:
    """One line of the table; `settings` are dotted names with ``__`` for the dots."""
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    where = dict(topology=topology) if topology else {}
    return dict(name=name, config=config, phase=phase, target=target, settings=dotted, **where)


def get_config(arg: str = "") -> ConfigDict:
    """Args: arg: empty, or ``scaling``."""
    if arg == "scaling":
        return ConfigDict(dict(rows=tuple(_scaled(shape) for shape in SCALING)))
    if arg:
        raise ValueError(f"Unknown argument {arg!r}: use plan.py or plan.py:scaling.")
    return ConfigDict(
        dict(
            rows=(
                row("1 on v5p:8x8x8", f"{STAGE1}:v5p_8x8x8", 0.82),
                row("1 on v5p:4x4x8", f"{STAGE1}:v5p_4x4x8", 0.77),
                row("1 on v4:8x8x16", f"{STAGE1}:v4_8x8x16", 0.68),
                row("1 on v6e:16x16", f"{STAGE1}:v6e_16x16", 0.66),
                row("1 on v5e:16x16", f"{STAGE1}:v5e_16x16", 0.71),
                row("1, 257 tokens, on v5p:8x8x8", f"{STAGE1}:v5p_8x8x8", 0.78, phase=1),
                row("1 on two v5p:8x8x8", f"{STAGE1}:v5p_2x8x8x8", 0.75),
                row("1 on four v5p:8x8x8", f"{STAGE1}:v5p_4x8x8x8", 0.75),
                row(
                    "1, batch 1,048,576, on v5p:8x8x16",
                    f"{STAGE1}:v5p_8x8x16",
                    0.70,
                    train__global_batch=1_048_576,
                    stage__compute__remat="layer@host,fc1:8",
                ),
                row("2 on v5p:4x4x8", f"{STAGE2}:v5p_4x4x8", 0.62),
                row("2 on v6e:16x16", f"{STAGE2}:v6e_16x16", 0.45),
                row("2 on v5e:16x16", f"{STAGE2}:v5e_16x16", 0.45),
                row("3 on v5p:4x4x8", f"{STAGE3},v5p_4x4x8", 0.68),
                row(
                    "3, batch 128, on v5p:4x4x8",
                    f"{STAGE3},v5p_4x4x8",
                    0.68,
                    train__global_batch=128,
                    stage__compute__remat="gate,up,qkv,mid,attn,llm/weights",
                ),
                row("3 on v5e:16x16", f"{STAGE3},v5e_16x16", 0.45),
                row("3 on v6e:16x16", f"{STAGE3},v6e_16x16", 0.45),
                row("1 on v5e:1x1, colab", f"{STAGE1}:colab", 0.0),
                row("2, lora, 14B, on v6e:1x1", f"{STAGE2}:lora,v6e_1x1", 0.0),
                row("3, lora, 6B + 7B, on v6e:1x1", f"{LORA}:lora,7b,v6e_1x1", 0.0),
                row("3, lora, 2B, on v6e:1x1", f"{LORA}:lora,2b,v6e_1x1", 0.0),
                row("3, lora, 2B, on v5e:1x1", f"{LORA}:lora,2b,v5e_1x1", 0.0),
            )
        )
    )


def _scaled(shape: str) -> dict[str, Any]:
    """320 pairs a chip, as on 512 chips; parameters over 64 of them, replicas take the rest."""
    return row(
        f"1 on v5p:{shape}",
        f"{STAGE1}:v5p_8x8x8",
        0.0,
        topology=f"v5p:{shape}",
        mesh__fsdp=64,
        train__global_batch=320 * math.prod(int(n) for n in shape.split("x")),
    )
