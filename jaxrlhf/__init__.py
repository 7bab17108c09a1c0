"""Reward-model-aware RLHF in JAX: the public door."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrlhf.models.hub import Loaded, load, save
    from jaxrlhf.pipeline.run import run
    from jaxrlhf.rollouts.generate import generate

# Resolved on first use, so that `import jaxrlhf.losses` loads neither Flax nor tokenizers.
_DOOR = {
    "load": "jaxrlhf.models.hub",
    "save": "jaxrlhf.models.hub",
    "Loaded": "jaxrlhf.models.hub",
    "generate": "jaxrlhf.rollouts.generate",
    "run": "jaxrlhf.pipeline.run",
}


def __getattr__(name: str) -> Any:
    if name not in _DOOR:
        raise AttributeError(f"module 'jaxrlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(_DOOR[name]), name)


__all__ = ["Loaded", "generate", "load", "run", "save"]
