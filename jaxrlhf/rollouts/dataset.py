"""One response to every prompt of a table: for preference pairs, evaluation and the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxrlhf.data.tokens import decode_responses, pad_id_of
from jaxrlhf.models.hub import Loaded, eos_ids
from jaxrlhf.rollouts.generate import check_left_padded, generate
from jaxrlhf.rollouts.passes import over_batches
from jaxrlhf.types import Array, Model, Params, PromptBatch, TextBatch


@dataclass(frozen=True)
class Sampling:
    """How text is drawn; `max_new_tokens` includes EOS."""

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    vocab_size: int | None = None
    pad_id: int | None = None

    @classmethod
    def of(cls, loaded: Loaded, *, max_new_tokens: int, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Sampling:
        """Sampling from a policy, with its own EOS, vocabulary and padding."""
        tokenizer = loaded.tokenizer
        return cls(max_new_tokens, eos_ids(loaded), temperature, top_k, top_p, len(tokenizer), pad_id_of(tokenizer))


def sample_dataset(
    model: Model,
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
    sampling: Sampling,
    *,
    batch_size: int,
    mesh: Any = None,
    **how: Any,
) -> TextBatch:
    """Prompts and sampled responses as one numpy table [N, …], in the order of the prompts.

    A row's text depends on (key, its `index_B`) alone. `how`: blocks and progress, as `over_batches` takes them.
    """
    check_left_padded(prompts.prompt_mask_BL)

    def read(batch: PromptBatch) -> tuple[Array, Array]:
        rows = batch.prompt_BL, batch.prompt_mask_BL
        completion = generate(model, params, *rows, key, index_B=batch.index_B, check_padding=False, mesh=mesh, **vars(sampling))
        return completion.tokens_BT, completion.mask_BT

    tokens, mask = over_batches(read, prompts, batch_size, mesh=mesh, ahead=False, **how)  # ahead, two caches would be in memory
    return TextBatch(prompts.prompt_BL, prompts.prompt_mask_BL, tokens, mask, prompts.row_mask_B, prompts.index_B)  # type: ignore[arg-type]


def sample_texts(loaded: Loaded, prompts: PromptBatch, key: jax.Array, sampling: Sampling, **how: Any) -> tuple[TextBatch, list[str]]:
    """(tokens, texts) of a policy's responses; `how` as `sample_dataset` takes it."""
    table = sample_dataset(loaded.model, loaded.params, prompts, key, sampling, **how)
    return table, decode_responses(table.response_BT, table.response_mask_BT, loaded.tokenizer, sampling.eos_ids)  # type: ignore[arg-type]


def renumbered(table: PromptBatch, number: int = 0) -> PromptBatch:
    """The prompts under row numbers 0, 1, …, or for a further sample under others, so that no two share random numbers."""
    n = len(table.index_B)
    return replace(table, index_B=np.arange(n, dtype=np.int32) + number * n)


def repeated(batch: PromptBatch, samples: int) -> PromptBatch:
    """Every row `samples` times in a row, each copy with a number of its own."""
    batch = jax.tree.map(lambda x: np.repeat(np.asarray(x), samples, axis=0), batch)
    return replace(batch, index_B=batch.index_B * samples + np.arange(len(batch.index_B), dtype=batch.index_B.dtype) % samples)
