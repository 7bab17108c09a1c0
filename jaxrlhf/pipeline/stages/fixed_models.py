"""What does not learn in a round: the base under a policy's adapters, and the reference, reward and SFT models."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from jaxrlhf import sharding
from jaxrlhf.algorithms.ppo import RoundModels
from jaxrlhf.config import Config
from jaxrlhf.models.hub import Loaded, reward_bias
from jaxrlhf.models.lora import adapters
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.storage.stage import Done
from jaxrlhf.types import Params


class SplitParams(NamedTuple):
    """A policy's parameters: what learns, and the frozen rest. Without LoRA all of it learns and `rest` is None."""

    learned: Params
    rest: Params | None


def split_params(setting: RunContext, policy: Loaded, key: jax.Array) -> SplitParams:
    """The policy as the config lets it learn. The rest holds the policy's own arrays: whoever reads those too has no second copy."""
    section = setting.config.lora
    if not section.r:
        return SplitParams(policy.params, None)
    learned, rest = adapters(policy.params, key, r=section.r, alpha=section.alpha, targets=section.target_modules)
    return SplitParams(learned, sharding.place(rest, setting.mesh))


def lora_slice(config: Config) -> dict[str, Any]:
    """What a policy stage depends on because of LoRA; nothing where it is off, so that those stages keep their hashes."""
    section = config.lora
    return {"lora": {"r": section.r, "alpha": section.alpha, "targets": sorted(section.target_modules)}} if section.r else {}


def fixed_models(
    setting: RunContext,
    at_hand: dict[str, Params],
    rewards: tuple[Done, ...],
    bias: float,
    *,
    ensemble: bool,
    reference: Done,
    sft: Done,
    rest: Params | None,
) -> RoundModels:
    """The models of a round that do not learn; one that is `at_hand` (parameters by the hash of their stage) is not read again.

    The first of `rewards`, whose bias is `bias`, is at hand; the others are the further members of an ensemble. `rest` is what lies under
    the adapters. `at_hand` is used up: a caller that holds its models nowhere else has none in memory that the round does not need. With
    `model.offload_frozen` each goes to the host's memory before the next is read; a reference that is the base is needed and stays.
    """
    offloaded = setting.config.model.offload_frozen
    away = sharding.offload if offloaded else lambda params: params

    def params_of(done: Done) -> Params:
        if done.hash not in at_hand:
            return away(setting.load(done, head="lm").params)
        params = at_hand.pop(done.hash)
        return params if rest is not None else away(params)

    def member(done: Done) -> tuple[Params, float]:
        one = setting.load(done, head="scalar")
        return away(one.params), reward_bias(one)

    for hash in at_hand.keys() - {rewards[0].hash, reference.hash, sft.hash}:
        del at_hand[hash]
    first = away(at_hand.pop(rewards[0].hash))
    others = [member(done) for done in rewards[1:]] if ensemble else []
    return RoundModels(
        reference=params_of(reference),
        reward=(first, *(params for params, _ in others)) if ensemble else first,
        reward_bias=(bias, *(its for _, its in others)) if ensemble else bias,
        sft=params_of(sft) if reference.hash != sft.hash else None,
        base=None if rest is None else {"policy": rest},
        offloaded=offloaded,
    )
