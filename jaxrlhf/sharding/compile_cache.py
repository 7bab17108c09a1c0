"""Switch on JAX's persistent compilation cache, unless the user has configured it."""

import hashlib
import logging
import os
import platform
from pathlib import Path

_log = logging.getLogger(__name__)


def cache_compilations() -> None:
    """Keep compiled programs between processes, unless the user has set jax_compilation_cache_dir (a folder, a URL, or "" for none).

    The cache cannot end a run: JAX compiles again what it cannot read, and a folder that cannot be written is a warning.
    Programs are compiled for the instructions of one CPU, so each kind of machine has its own folder.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is not None:  # "": switched off
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrlhf" / "xla" / _machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        _log.warning("compiled programs are not kept for the next run (%s); set JAX_COMPILATION_CACHE_DIR to another folder.", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _machine() -> str:
    """A name that is equal for machines whose CPUs have the same instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        facts = platform.processor()
    return f"{platform.machine() or 'unknown'}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
