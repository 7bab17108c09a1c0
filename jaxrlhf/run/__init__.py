"""Runs: text in, table out. The package is callable, because the door's `jaxrlhf.run(config)` and this package share a name."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any


class _Callable(types.ModuleType):
    """Importing any module of the package binds `jaxrlhf.run` to it; the call must work before and after."""

    def __call__(self, config: Any, **options: Any) -> Path:
        from jaxrlhf.run.run import run

        return run(config, **options)


sys.modules[__name__].__class__ = _Callable
