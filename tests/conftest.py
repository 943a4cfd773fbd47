"""The strict harness: four CPU devices, no silent promotion, no rank promotion, warnings are errors (pyproject)."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
# Compiling is most of the suite's time, and tiny models gain nothing from good code.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
# One compile cache for every test process of this user: the tiny models compile once, not once a worker.
_CACHE = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"speechjax-test-xla-{os.getuid()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_speech() -> Path:
    """Folder with `fsdd/` and `kerstin/`; tests that want it skip where it is missing."""
    folder = Path(os.environ.get("SPEECHJAX_REAL_SPEECH", REPO.parent / "shared" / "data"))
    if not (folder / "fsdd").is_dir():
        pytest.skip(f"no real speech at {folder} (set SPEECHJAX_REAL_SPEECH)")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the cases of slow.txt, which were measured; what is slow by its nature has the mark in its file."""
    lines = Path(__file__).with_name("slow.txt").read_text("utf-8").splitlines()
    slow = {line for line in lines if not line.startswith("#")}
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)
