"""A scorer of the user's own: `module:attribute`, a function f(prompts, responses) -> one number a response."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrlhf import distributed
from jaxrlhf.plugins import plugin
from jaxrlhf.scorers import Scorer
from jaxrlhf.storage.blocks import NOWHERE, Blocks, Results

ROWS = 256  # of a call whose answers are kept: a function that asks a server is not asked twice for more than these


def function_scorer(name: str) -> Scorer:
    """The scorer named by `module:attribute`, its every answer checked.

    The function is called with two lists of N strings and must return N finite real numbers (list, NumPy, JAX or CPU tensor).
    Raises ValueError for a malformed name or a wrong answer, ImportError for a module or attribute that is not there, TypeError for
    something that cannot be called.
    """
    found = plugin(name)
    if not callable(found):
        raise TypeError(f"{name!r} is a {type(found).__name__}, which cannot be called; name a function f(prompts, responses) -> scores.")
    try:
        inspect.signature(found).bind([], [])
    except TypeError as error:
        raise TypeError(f"{name!r} cannot be called as f(prompts, responses) ({error}); give it those two parameters.") from error
    except ValueError:  # compiled code may not say what it takes
        pass
    return checked(found, name)


def checked(function: Callable[[list[str], list[str]], Any], name: str) -> Scorer:
    """`function` as a scorer whose answers are float32 [N] and finite, or a ValueError that names `name`, the row and the text.

    Of several processes the leader asks, for all: a user's function may ask a server, or not say the same thing twice.
    """

    def score(prompts: Sequence[str], responses: Sequence[str], blocks: Blocks = NOWHERE) -> np.ndarray:
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses; give one response a prompt.")
        rows = ROWS if blocks.folder else max(len(prompts), 1)
        calls = [slice(first, first + rows) for first in range(0, max(len(prompts), 1), rows)]

        def ask(part: slice) -> Results:
            asked, said = responses[part], None
            if distributed.is_leader():
                said = _check(function(list(prompts[part]), list(asked)), asked, name).tolist()
            return (np.asarray(distributed.agree(said, "gold"), np.float32),)

        return blocks.of("gold", prompts, responses).collect(len(calls), lambda start: map(ask, calls[start:]))[0]

    return score


def _check(answer: Any, responses: Sequence[str], name: str) -> np.ndarray:
    count = len(responses)
    try:
        raw = np.asarray(answer)
    except Exception as error:  # ragged lists, tensors on a device or with a gradient
        kind = type(answer).__name__
        raise ValueError(f"{name} returned a {kind} that is no array ({error}); return {count} numbers.") from error
    if raw.shape != (count,):
        raise ValueError(f"{name} returned shape {raw.shape} for {count} responses; return shape ({count},), one score each.")
    try:
        # bfloat16 and other floats from outside NumPy are kind "V" and convert; strings, objects and complex numbers are refused
        if raw.dtype.kind not in "fiubV" and raw.size:
            raise TypeError(f"dtype {raw.dtype}")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is reported below
            scores = raw.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} returned dtype {raw.dtype}, not real numbers; return floats.") from error
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise ValueError(
            f"{name} returned {raw[bad[0]]} for response {bad[0]} ({responses[bad[0]][:80]!r}), and {bad.size} of {count} scores "
            "are not finite float32 numbers; give every response, the empty one too, a finite score."
        )
    return scores
