"""What every test shares: four fake CPU devices, a compilation cache, a run of seconds, and the folder of real data where there is one."""

import copy
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "golden"))  # tiny models and encoders, which the scripts of goldens make too

# The models here are tiny, and compiling them is most of the time. What the code computes does not depend on how hard the compiler
# tries, so it does not try: a program of a step compiles in a tenth of the time. XLA reads its flags once, when the backend starts.
QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}
# Before jax is imported, and in the environment: the processes that tests start have the same flags and the same cache.
os.environ["XLA_FLAGS"] = " ".join([*(f"--{name}={value}" for name, value in QUICK.items()), os.environ.get("XLA_FLAGS", "")]).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402
from tiny_run import TINY  # noqa: E402

from jaxrlhf import sharding  # noqa: E402
from jaxrlhf.recipe import from_mapping  # noqa: E402
from jaxrlhf.sharding import mesh  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)  # before the backend starts; one device stays the default one


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


@pytest.fixture(scope="session")
def tiny_mapping():
    """tiny_mapping(output, {"section.key": value, …}) → the recipe as a mapping."""

    def make(output, **changes: Any) -> dict[str, Any]:
        raw = copy.deepcopy(TINY) | {"output": str(output)}
        for key, value in changes.items():
            *sections, name = key.split("__")
            inner = raw
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[name] = value
        return raw

    return make


@pytest.fixture(scope="session")
def tiny_config(tiny_mapping):
    return lambda output, **changes: from_mapping(tiny_mapping(output, **changes))


@pytest.fixture(scope="module")
def one_device():
    """Runs of this module see one of the four fake devices, which is what compiles fastest."""
    patch = pytest.MonkeyPatch()
    make = sharding.make_mesh
    for module in (mesh, sharding):  # where the package looks it up, and where tests do
        patch.setattr(module, "make_mesh", lambda *axes: make(*axes, devices=jax.devices()[:1]))
    yield
    patch.undo()
