"""`module:attribute` → the object: how a config names code that is not the package's."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

# module → (its spec, its text when it was first asked for). A reload has another spec: the text is that of the code that runs, and an edit
# under a running process changes neither.
_SOURCES: dict[str, tuple[Any, str | None]] = {}


def source_of(name: str) -> str | None:
    """The text of the module that `module:attribute` names (a change of code is a change of the run); None where nothing is named.

    It is that module's text alone, not of what it imports, and as it was when this process first asked: restart Python, or reload the
    module, after a change.
    """
    if ":" not in name:
        return None
    plugin(name)  # says clearly what is missing
    return _source(sys.modules[name.partition(":")[0]])


def _source(module: ModuleType) -> str | None:
    known = _SOURCES.get(module.__name__)
    if known is None or known[0] is not module.__spec__:
        try:
            text = inspect.getsource(module)
        except (OSError, TypeError):  # compiled, or made at run time
            text = None
        known = _SOURCES[module.__name__] = module.__spec__, text
    return known[1]


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
    _source(found)  # now, while it is what was just read
    where = getattr(found, "__file__", None)
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = ", ".join(n for n in dir(found) if not n.startswith("_")) or "nothing public"
            of = f" (the module is {where})" if where else ""  # another module of that name may have come first
            raise ImportError(f"{name!r}: no {part!r} there; it has {public}{of}.")
        found = getattr(found, part)
    return found
