"""Every test sees eight CPU devices, float32 products in full precision, and checked shapes."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before the first import of jax, which reads these once; processes that tests start inherit them.
flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
# Tests run tiny programs once: polishing the code would take five times as long as making it.
quick = ["--xla_backend_optimization_level=0"]
# Eight devices share few cores: a busy machine is no deadlock.
quick.append("--xla_cpu_collective_call_terminate_timeout_seconds=300")
if version("jaxlib").startswith("0.10."):
    quick.append("--xla_cpu_use_fusion_emitters=false")  # an option that later versions lack
# A device that waits for the others holds a thread; with as many threads as devices, XLA's choice
# on a small machine, two programs under way can wait for each other forever.
os.environ.setdefault("PJRT_NPROC", "32")
# A few tests need the chip itself: INTERNVL_PLATFORM=tpu runs them on it.
os.environ["JAX_PLATFORMS"] = os.environ.get("INTERNVL_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = " ".join([*quick, *flags, "--xla_force_host_platform_device_count=8"])
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# Nearly all the time goes into compiling, which a second run of the same test need not repeat.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Signatures are checked as they run: an int is a float to a reader, so it is to the checker.
install_import_hook(
    ["internvl_jax", "data_pipelines"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture(scope="session")
def reference_root() -> Path:
    """All reference folders, where somebody has them: INTERNVL_REFERENCE names their parent."""
    root = os.environ.get("INTERNVL_REFERENCE")
    if not root:
        pytest.skip("INTERNVL_REFERENCE names no folder of reference cases")
    return Path(root)
