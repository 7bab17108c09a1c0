"""Sequence log-probs of stored responses under a model: computed once, kept on disk by pair id."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.config import LimitsConfig
from jaxrlhf.data.batches import sides
from jaxrlhf.data.columns import cached_columns, column_header, fingerprint
from jaxrlhf.data.pairs import Pair, dataset_hash
from jaxrlhf.data.tokens import tokenizer_fingerprint
from jaxrlhf.losses import sequence_logp
from jaxrlhf.models.hub import Loaded
from jaxrlhf.rollouts.passes import over_batches
from jaxrlhf.storage.blocks import NOWHERE, Blocks
from jaxrlhf.types import Array, Model, PairBatch, Params, Progress, TextBatch

NAMES = ("chosen_logp", "rejected_logp")


@lru_cache(maxsize=16)
def logp_pass(model: Model, temperature: float, mesh: Any) -> sharding.Compiled:
    """Log-probs of responses compiled for the devices of `mesh`: (params, TextBatch) → nats [B]."""

    def score(params: Params, batch: TextBatch) -> Array:
        tokens = jnp.concatenate([batch.prompt_BL, batch.response_BT], axis=1)
        mask = jnp.concatenate([batch.prompt_mask_BL, batch.response_mask_BT], axis=1)
        stats = model.score_tokens(params, tokens, mask, start=batch.prompt_BL.shape[1], temperature=temperature)
        return sequence_logp(stats.logp_BT, batch.response_mask_BT)

    return sharding.rows(score, mesh)


def response_logps(
    model: Model,
    params: Params,
    texts: TextBatch,
    *,
    temperature: float,
    batch_size: int,
    mesh: Any = None,
    **how: Any,
) -> np.ndarray:
    """Σ_t log π(y_t | x, y_<t) of every response, EOS included, at `temperature`; float32 [N] in nats.

    `how`: blocks and progress, as `over_batches` takes them.
    """
    score = logp_pass(model, temperature, mesh)
    return over_batches(lambda batch: (score(params, batch),), texts, batch_size, mesh=mesh, **how)[0]


def pair_logps(
    model: Model,
    params: Params,
    pairs: PairBatch,
    *,
    temperature: float,
    batch_size: int,
    max_tokens: int | None = None,
    mesh: Any = None,
    blocks: Blocks = NOWHERE,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """{"chosen_logp", "rejected_logp"}, each float32 [N]; over the first `max_tokens` response tokens only where it is given."""
    columns = {}
    for side, (name, texts) in enumerate(zip(NAMES, sides(pairs), strict=True)):
        texts = replace(texts, response_BT=texts.response_BT[:, :max_tokens], response_mask_BT=texts.response_mask_BT[:, :max_tokens])
        # Both sides are one pass to whoever watches.
        report = None if progress is None else lambda done, total, side=side: progress(side * total + done, 2 * total)
        how = {"mesh": mesh, "blocks": blocks.of(name), "progress": report}
        columns[name] = response_logps(model, params, texts, temperature=temperature, batch_size=batch_size, **how)
    return columns


def stored_pair_logps(
    columns: Path,
    rows: Sequence[Pair],
    tokens: PairBatch,
    model: Callable[[], Loaded],
    *,
    model_hash: str,
    tokenizer: Any,
    limits: LimitsConfig,
    temperature: float,
    max_tokens: int | None = None,
    **how: Any,
) -> dict[str, np.ndarray]:
    """`pair_logps` of the pairs `rows`, whose tokens are `tokens`; from disk where that model has seen them before.

    OCRM's ratios and DPO's reference read the same columns under `columns`, named by all that they depend on. `model()` is called only
    where they have to be computed. `how`: batch_size, mesh, blocks and progress, as `pair_logps` takes them.
    """
    read = {"temperature": temperature, "max_tokens": max_tokens}
    header = column_header(
        dataset=dataset_hash(rows), model=model_hash, tokenizer=tokenizer_fingerprint(tokenizer), limits=asdict(limits), **read
    )

    def compute() -> dict[str, np.ndarray]:
        loaded = model()
        return pair_logps(loaded.model, loaded.params, tokens, **read, **how)

    return cached_columns(columns / f"logps-{fingerprint(header)}", [row.id for row in rows], NAMES, header, compute)
