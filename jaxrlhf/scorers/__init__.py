"""Scorers give texts a number: the gold judge of an experiment or a proxy of it."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jaxrlhf.storage.blocks import NOWHERE, Blocks


class Scorer(Protocol):
    """(N prompts, N responses) -> float32 [N], higher is better. Responses are text without EOS and special tokens.

    A scorer that takes its time keeps what it has scored in `blocks`.
    """

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], /, blocks: Blocks = NOWHERE) -> np.ndarray: ...


__all__ = ["Scorer"]
