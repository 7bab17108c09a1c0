"""Losses: pure functions of arrays. Arrays are positional, hyperparameters keyword-only.

The registries name the losses that a config can ask for. An entry of `PAIR_LOSSES` is called by the pair step as
`entry.loss(outputs, batch, total=total) -> (scalar, metrics)`; an entry of `POLICY_LOSSES` by the PPO step as
`entry.loss(stats, rollout, total=total)`. Both honour `row_mask_B`, and every metric is, like the loss, a sum divided by
`total`: the results of micro-batches and devices add. Metric names are bare (`accuracy`); who logs them prefixes them.

Hyperparameters are further keywords of `loss`. Their defaults are the usual ones of the field and no more: β = 0.1 (DPO,
IPO, WPO), no label smoothing, WPO weights clipped at 1, PPO clip 0.2 without dual clip or entropy bonus, no centring.
`bind(PAIR_LOSSES["dpo"], beta=0.05)` returns the entry with some of them fixed.

Your own loss is one function with that signature and one more line here, or `module:attribute` in the config, where the
attribute is a `PairLoss` or `PolicyLoss`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from jaxrlhf.losses.advantages import gae, rloo_advantages, value_mask
from jaxrlhf.losses.bradley_terry import bradley_terry_loss, bradley_terry_margin_pair_loss, bradley_terry_pair_loss
from jaxrlhf.losses.dpo import dpo_loss, dpo_pair_loss, ipo_loss, ipo_mean_pair_loss, ipo_pair_loss
from jaxrlhf.losses.kl import adaptive_kl, kl_estimate, shaped_rewards
from jaxrlhf.losses.logp import sequence_logp
from jaxrlhf.losses.masked import masked_count, masked_mean, masked_sum, masked_whiten
from jaxrlhf.losses.ocrm import effective_sample_size, eta_for_ess, importance_weights, relative_log_ratio, weight_summary
from jaxrlhf.losses.ppo import ppo_policy_loss, ppo_policy_stats, ppo_rollout_loss, ppo_value_loss, ppo_value_stats
from jaxrlhf.losses.sft import sft_loss
from jaxrlhf.losses.wpo import wpo_pair_loss, wpo_weights
from jaxrlhf.types import PairLoss, PolicyLoss

_REFERENCE = ("reference_chosen_logp", "reference_rejected_logp")

PAIR_LOSSES: dict[str, PairLoss] = {
    "bradley_terry": PairLoss("scalar", (), bradley_terry_pair_loss),
    "bradley_terry_margin": PairLoss("scalar", ("margin",), bradley_terry_margin_pair_loss),
    "dpo": PairLoss("lm", _REFERENCE, dpo_pair_loss),
    "ipo": PairLoss("lm", _REFERENCE, ipo_pair_loss),
    "ipo_mean": PairLoss("lm", _REFERENCE, ipo_mean_pair_loss),
    "wpo": PairLoss("lm", _REFERENCE, wpo_pair_loss),
}

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo": PolicyLoss((), ppo_rollout_loss),
}

_Entry = TypeVar("_Entry", bound=PairLoss | PolicyLoss)


def bind(entry: _Entry, **hyperparameters: Any) -> _Entry:
    """The registry entry with hyperparameters of its loss fixed; a name the loss does not know is an error.

    Equal arguments give the very same object, by which compiled steps are found again; a module that was reloaded has another loss.
    """
    known = hyperparameter_names(entry)
    unknown = sorted(set(hyperparameters) - set(known))
    if unknown:
        raise TypeError(f"the loss has no hyperparameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}.")
    return _bound(entry, tuple(sorted(hyperparameters.items())))


def pair_loss_named(name: str, head: str, plugin: Callable[[str], PairLoss], *, key: str, of: str) -> PairLoss:
    """The entry `name`, or what `module:attribute` names. ValueError, which names the config's `key`, where it is no loss for `of`."""
    fitting = ", ".join(known for known, entry in PAIR_LOSSES.items() if entry.head == head)
    if ":" not in name and name not in PAIR_LOSSES:
        raise ValueError(f"{key} {name!r} is unknown; use one of {fitting} or module:attribute.")
    entry = plugin(name) if ":" in name else PAIR_LOSSES[name]
    if not isinstance(entry, PairLoss):
        raise ValueError(f"{key} {name!r} is a {type(entry).__name__}; name a jaxrlhf.types.PairLoss(head, columns, loss).")
    if entry.head != head:
        raise ValueError(f"{key} {name!r} needs head {entry.head!r}; {of} has head {head!r}, as {fitting} have.")
    return entry


@functools.lru_cache(maxsize=64)
def _bound(entry: Any, hyperparameters: tuple[tuple[str, Any], ...]) -> Any:
    return entry._replace(loss=functools.partial(entry.loss, **dict(hyperparameters)))


def hyperparameter_names(entry: PairLoss | PolicyLoss) -> tuple[str, ...]:
    """The keywords of the entry's loss that a config may set: all but `total`."""
    parameters = inspect.signature(entry.loss).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "total")


__all__ = [
    "PAIR_LOSSES", "POLICY_LOSSES", "adaptive_kl", "bind", "bradley_terry_loss", "dpo_loss", "effective_sample_size", "eta_for_ess", "gae",
    "hyperparameter_names", "importance_weights", "ipo_loss", "kl_estimate", "masked_count", "masked_mean", "masked_sum", "masked_whiten",
    "pair_loss_named", "ppo_policy_loss", "ppo_policy_stats", "ppo_value_loss", "ppo_value_stats", "relative_log_ratio", "rloo_advantages",
    "sequence_logp", "sft_loss", "shaped_rewards", "value_mask", "weight_summary", "wpo_weights",
]  # fmt: skip
