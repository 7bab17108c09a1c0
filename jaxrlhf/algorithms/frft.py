"""FRFT: the reward model is refitted on the offline pairs that look like what the policy writes now.

Krishna, Sahoo (2024), Solving the Inverse Alignment Problem for Efficient RLHF. The paper's own numbers are not known to us; rules and
defaults are those of its public code, with the deviations that `offline/select.py` names.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxrlhf import rng
from jaxrlhf.algorithms.ocrm import importance_weighted
from jaxrlhf.algorithms.update import Pairs, RoundContext


class Similar(NamedTuple):
    """What the filter knows of every pair: cosine of each side with the policy's text, and the index of the generation it is from."""

    chosen_N: np.ndarray
    rejected_N: np.ndarray
    nearest_N: np.ndarray  # row of `generations` that the chosen response was compared with, or is nearest to
    generations: list[str]


def nearest(context: RoundContext, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """The pairs nearest to the policy's own text, with weight 1."""
    similar = similarities(context, pairs)
    return _kept(context, pairs, similar, _selected(context, pairs, similar))


def random_subset(context: RoundContext, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """The control: as many pairs as `nearest` would keep, drawn at random."""
    from jaxrlhf.offline.select import random_subset as draw

    similar = similarities(context, pairs)
    budget = len(_selected(context, pairs, similar))
    seed = rng.number(rng.stream(context.key, "random-subset"))
    return _kept(context, pairs, similar, draw(pairs.ids, budget, seed=seed))


def nearest_importance_weighted(context: RoundContext, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """The nearest pairs, and among them OCRM's weights."""
    kept, _ = nearest(context, pairs)
    return importance_weighted(context, kept)
