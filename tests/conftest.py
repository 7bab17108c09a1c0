"""What every test shares: four fake CPU devices, a compilation cache, and the folder of real data where there is one."""

import os
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]

jax.config.update("jax_num_cpu_devices", 4)  # before the backend starts; one device stays the default one
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module", autouse=True)
def compiled_for_this_file_only():
    """What a file compiled goes with it: over all files it would be gigabytes a process."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that JAXRLHF_DATA names; without it the test is skipped."""
    folder = os.environ.get("JAXRLHF_DATA")
    if not folder:
        pytest.skip("JAXRLHF_DATA is not set: no real data to test with")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"JAXRLHF_DATA is {folder}, which is not a folder")
    return path
