"""Direct preference training: DPO, IPO, WPO, and whatever pair loss over log-probs a user names. The pairs teach the policy itself."""

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from jaxrlhf.config import DPOConfig
from jaxrlhf.losses import bind, hyperparameter_names, pair_loss_named
from jaxrlhf.types import PairLoss

# What a loss reads of the reference model, and the precomputed log-probs it is.
REFERENCE = {"reference_chosen_logp": "chosen_logp", "reference_rejected_logp": "rejected_logp"}
# Hyperparameters of a pair loss that a setting of another name gives.
_NAMED = {"clip": "wpo_clip"}


def _hyperparameters(config: DPOConfig) -> dict[str, Any]:
    """What the section gives a pair loss, by the loss's own names."""
    return {"beta": config.beta, "label_smoothing": config.label_smoothing, "clip": config.wpo_clip}


def preference_loss(config: DPOConfig, policy_update: str, plugin: Callable[[str], PairLoss]) -> PairLoss:
    """The pair loss of `policy_update` ("wpo": WPO; "dpo": the one that the section names), with those hyperparameters bound that it has.

    Raises ValueError where it is not a pair loss over log-probs, or has no use for what the section sets.
    """
    name = "wpo" if policy_update == "wpo" else config.loss
    loss = pair_loss_named(name, "lm", plugin, key="dpo.loss", of="a policy")
    known = hyperparameter_names(loss)
    usual = {field.name: field.default for field in fields(config)}
    given = _hyperparameters(config)
    for setting in ("beta", "label_smoothing"):
        value = given[setting]
        if setting not in known and value != usual[setting]:
            raise ValueError(
                f"dpo.{setting} is {value}, but dpo.loss {name!r} has no hyperparameter {setting!r}; "
                f"leave it at {usual[setting]} or name a loss with that keyword."
            )
    return bind(loss, **{name: value for name, value in given.items() if name in known})


def settings_read(config: DPOConfig, policy_update: str, loss: PairLoss) -> dict[str, Any]:
    """The section less what a training with `loss` never looks at: what its result depends on."""
    known = hyperparameter_names(loss)
    unread = {_NAMED.get(name, name) for name in _hyperparameters(config) if name not in known}
    unread |= {"loss"} if policy_update == "wpo" else set()
    unread |= {"eval_batch_size"} if not needs_reference(loss) else set()
    return {name: value for name, value in asdict(config).items() if name not in unread}


def needs_reference(loss: PairLoss) -> bool:
    """Whether the loss reads log-probs of a reference model (a reference-free one, SimPO's, does not)."""
    return any(name in REFERENCE for name in loss.columns)
