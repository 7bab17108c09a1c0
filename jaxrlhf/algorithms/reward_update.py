"""What a reward update sees and returns: the pairs the next reward model is fitted on, and their weights.

OCRM re-weights the offline pairs, FRFT selects among them, RLP adds to them; what follows is the same Bradley–Terry step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf.config import Config, EncoderConfig
from jaxrlhf.data.columns import fingerprint
from jaxrlhf.data.pairs import Pair, Prompt
from jaxrlhf.files import read_json, write_whole
from jaxrlhf.models.hub import Loaded
from jaxrlhf.storage.blocks import NOWHERE, Blocks
from jaxrlhf.types import PairBatch


class Pairs(NamedTuple):
    """The training pairs as text and as tokens, row for row: `tokens` holds numpy arrays of leading length N = len(rows)."""

    rows: list[Pair]
    tokens: PairBatch

    @property
    def ids(self) -> list[str]:
        return [row.id for row in self.rows]

    def select(self, index: np.ndarray) -> Pairs:
        """The pairs at `index`, in that order, renumbered from 0."""
        tokens = jax.tree.map(lambda x: x[index], self.tokens)
        return Pairs([self.rows[i] for i in index], replace(tokens, index_B=np.arange(len(index), dtype=np.int32)))


@dataclass(frozen=True)
class RoundContext:
    """Where a reward update stands: `policy` is the policy the new reward model is for, `sft` the sampler of the pairs, `reward` the reward
    model in use (of an ensemble the first member).

    `folder` is the update's own stage folder: what it writes there is kept with the run. `report` adds to its report.json, whose
    numbers reach the run's metrics as weights/NAME, and "ess", "ess_fraction" and "eta" its summary. "needs_sampler": true there says
    that the weights take `sft` for the sampler of the pairs, and the run notes where it is not. `progress(what)` gives what a
    pass reports (batches done, of all) to, `blocks` is where it keeps them until the update is finished, and `kept(what)` is both as
    keywords of our passes. `columns` is the folder of precomputed columns, shared by rounds, arms and runs;
    `policy_hash` and `sft_hash` name the two models there. `prompts` reads the run's PPO prompts; `kept_before` are the ids of the
    pairs the last update kept, None where there was none.
    """

    round: int
    policy: Loaded
    sft: Loaded
    reward: Loaded
    key: jax.Array
    folder: Path
    config: Config
    columns: Path
    policy_hash: str
    sft_hash: str
    mesh: Any = None
    progress: Callable[[str], Callable[[int, int], None] | None] = lambda what: None
    blocks: Blocks = NOWHERE
    prompts: Callable[[], list[Prompt]] = list
    kept_before: frozenset[str] | None = None
    fingerprint = staticmethod(fingerprint)  # of a dict (JSON): a short name for a folder under `columns`

    def kept(self, what: str) -> dict[str, Any]:
        """Blocks and progress of a pass, as the passes over tables take them; `what` names it in the update."""
        return {"blocks": self.blocks.of(what), "progress": self.progress(what)}

    def report(self, facts: Mapping[str, Any]) -> None:
        """Add `facts` (JSON) to what the update reports of itself."""
        path = self.folder / "report.json"
        known = read_json(path, "delete it, and the update reports again") if path.exists() else {}
        write_whole(path, json.dumps(known | dict(facts), indent=1))


RewardUpdate = Callable[[RoundContext, Pairs], "tuple[Pairs, np.ndarray]"]


def unweighted(context: RoundContext, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """All pairs with weight 1: the control that separates refitting from correcting."""
    del context
    return pairs, np.ones(len(pairs.rows), np.float32)


def encoder_options(config: EncoderConfig) -> dict[str, Any]:
    """The section `encoder` as the keywords of `offline.encoder_identity.encoder_identity`."""
    return {"encoder": config.source, "backend": config.backend, "pooling": config.pooling, "max_length": config.max_length}
