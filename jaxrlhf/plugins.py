"""`module:attribute` → the object: how a config names code that is not the package's."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any


def source_of(name: str) -> str | None:
    """The text of the module that `module:attribute` names (a change of code is a change of the run); None where nothing is named."""
    if ":" not in name:
        return None
    plugin(name)  # says clearly what is missing
    try:
        return inspect.getsource(sys.modules[name.partition(":")[0]])
    except (OSError, TypeError):  # compiled, or made at run time
        return None


def plugin(name: str) -> Any:
    """The object named by `module:attribute`. Raises ValueError for a malformed name, ImportError for one that is not there."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute) or module_name.startswith("."):
        raise ValueError(f"{name!r} names no object; write `module:attribute`, as in `my_package.rewards:score`.")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ImportError(f"{name!r}: no module {error.name!r}; install it or put its folder on PYTHONPATH.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = ", ".join(n for n in dir(found) if not n.startswith("_")) or "nothing public"
            raise ImportError(f"{name!r}: no {part!r} there; it has {public}.")
        found = getattr(found, part)
    return found
