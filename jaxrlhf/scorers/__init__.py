"""Scorers give texts a number: the gold judge of an experiment or a proxy of it."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Scorer(Protocol):
    """(N prompts, N responses) -> float32 [N], higher is better. Responses are text without EOS and special tokens."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], /) -> np.ndarray: ...


__all__ = ["Scorer"]
