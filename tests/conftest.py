"""Every test sees eight CPU devices, float32 matmuls in full precision, and checked shapes."""

from __future__ import annotations

import os

# Before the first import of jax: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        *(f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f),
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"

from jaxtyping import install_import_hook

# Signatures are checked as they run: an int is a float to a reader, so it is to the checker.
install_import_hook(
    ["internvl_jax", "data_pipelines"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
