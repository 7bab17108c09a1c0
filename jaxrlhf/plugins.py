"""Import the object that a config names as `module:attribute`, for code outside of the package."""

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

# module → (its spec, its source when it was first read). A reload has another spec, so the source is that of the running code, even if the
# file is edited meanwhile.
_SOURCES: dict[str, tuple[Any, str | None]] = {}


def source_of(name: str) -> str | None:
    """The source of the module in `module:attribute`, which is part of a stage's hash; None for a name without a module.

    It is the source of that module alone, not of what it imports, as it was when this process imported it: after a change restart Python
    or reload the module.
    """
    if ":" not in name:
        return None
    plugin(name)  # raises a clear error
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
    _source(found)  # now, while the file is what was just imported
    where = getattr(found, "__file__", None)
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = ", ".join(n for n in dir(found) if not n.startswith("_")) or "nothing public"
            of = f" (the module is {where})" if where else ""  # another module of that name may come first on the path
            raise ImportError(f"{name!r}: no {part!r} there; it has {public}{of}.")
        found = getattr(found, part)
    return found
