"""The pytrees that cross a border between packages.

Shapes are suffixes: B rows, L prompt length, T response length, V vocabulary. Prompts are left-padded, responses
right-padded; masks are boolean and carried, never rebuilt from token ids.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax

Array = jax.Array
Params = Any  # a plain nested dict of arrays
Metrics = dict[str, Array]
Progress = Callable[[int, int], None]  # (rows or batches done, of all), from (0, all) on

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def _pytree(cls: type[_T]) -> type[_T]:
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


@_pytree
class PairBatch:
    """Preference pairs as tokens. `index_B` is the global row number; ids (strings) stay on the host."""

    prompt_BL: Array
    prompt_mask_BL: Array
    chosen_BT: Array
    chosen_mask_BT: Array
    rejected_BT: Array
    rejected_mask_BT: Array
    weights_B: Array  # multiplies the whole loss of a pair
    row_mask_B: Array  # False: a row that only fills the batch; counts nowhere
    index_B: Array
    columns: dict[str, Array] = field(default_factory=dict)  # precomputed facts, leading axis B


@_pytree
class PromptBatch:
    """Prompts to sample from."""

    prompt_BL: Array
    prompt_mask_BL: Array
    row_mask_B: Array
    index_B: Array


@_pytree
class TextBatch:
    """Prompt and response for supervised training; the loss is on the response, on both, or as the step says."""

    prompt_BL: Array
    prompt_mask_BL: Array
    response_BT: Array
    response_mask_BT: Array
    row_mask_B: Array
    index_B: Array


@_pytree
class Completion:
    """What the sampler returns: tokens up to and including the first EOS, their mask, and the sampler's own log-probs."""

    tokens_BT: Array
    mask_BT: Array
    logp_BT: Array


@_pytree
class Rollout:
    """Everything one PPO update needs, constant while it runs."""

    prompt_BL: Array
    prompt_mask_BL: Array
    tokens_BT: Array
    mask_BT: Array  # t ≤ len: policy loss, KL, entropy, whitening
    value_mask_BT: Array  # see losses.advantages.value_mask
    logp_BT: Array
    reference_logp_BT: Array
    values_BT: Array
    advantages_BT: Array
    returns_BT: Array
    scores_B: Array
    row_mask_B: Array


@_pytree
class TokenStats:
    """Per response token, under one model at one temperature: log π(y_t), entropy, log Σ_v π(v)², and whether y_t is the likeliest."""

    logp_BT: Array
    entropy_BT: Array
    log_sum_sq_BT: Array
    greedy_BT: Array | None = None


@_pytree
class TrainState:
    """What a checkpoint holds. `controller` is the adaptive KL coefficient for PPO and empty elsewhere."""

    step: Array
    params: Params
    opt_state: Any
    controller: Any = field(default_factory=dict)


@_pytree
class PairOutputs:
    """What a pair loss sees: scalar scores (head "scalar") or sequence log-probs (head "lm") of both sides."""

    chosen_B: Array
    rejected_B: Array
    chosen_stats: TokenStats | None = None
    rejected_stats: TokenStats | None = None


# (params, batch, frozen parameters or none) → (row_mask_B, metrics of the global batch with the `total` that they are divided by)
Evaluate = Callable[..., tuple[Array, Metrics]]


class PairLoss(NamedTuple):
    """A loss on preference pairs, as the pair step calls it: `loss(outputs, batch, *, total=None) -> (scalar, metrics)`."""

    head: str  # "scalar" | "lm"
    columns: tuple[str, ...]  # names it reads from batch.columns
    loss: Callable[..., tuple[Array, Metrics]]
    defaults: tuple[float | None, ...] = ()  # one a column: its value while no reward update has made it (round 1); (): none has one


class PolicyLoss(NamedTuple):
    """A policy loss, as the PPO step calls it: `loss(stats, rollout, *, total=None, **hyper) -> (scalar, metrics)`."""

    columns: tuple[str, ...]
    loss: Callable[..., tuple[Array, Metrics]]


class Outputs(NamedTuple):
    """A model's forward pass: `logits` [B, S, V] (head "lm") or `scalars` [B, S] (head "scalar"), in float32."""

    logits: Array | None = None
    scalars: Array | None = None


class Model(NamedTuple):
    """A transformer as pure functions over a plain nested dict of arrays.

    init(key) -> params
    apply(params, tokens_BL, mask_BL, *, start=0) -> Outputs for positions ≥ start
    prefill(params, tokens_BL, mask_BL, *, length) -> (logits_BV of the last position, cache with room for `length` tokens in all)
    decode(params, tokens_B, cache) -> (logits_BV, cache)
    score_tokens(params, tokens_BL, mask_BL, *, start, temperature=1.0, chunk=...) -> TokenStats of tokens at positions ≥ start
    """

    init: Callable[..., Params]
    apply: Callable[..., Outputs]
    prefill: Callable[..., tuple[Array, Any]]
    decode: Callable[..., tuple[Array, Any]]
    score_tokens: Callable[..., TokenStats]
