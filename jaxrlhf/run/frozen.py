"""What does not learn in a round: the base under a policy's adapters, and the reference, reward and SFT models."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from jaxrlhf import sharding
from jaxrlhf.algorithms.ppo import RoundModels
from jaxrlhf.config import Config
from jaxrlhf.models.hub import Loaded, reward_bias
from jaxrlhf.models.lora import adapters, merged
from jaxrlhf.run.setting import Setting
from jaxrlhf.run.stages import Done
from jaxrlhf.steps.state import joined
from jaxrlhf.types import Params


class Halves(NamedTuple):
    """A policy's parameters: what learns, and the frozen rest. Without LoRA all of it learns and `rest` is None."""

    learned: Params
    rest: Params | None


def halves(setting: Setting, policy: Loaded, key: jax.Array) -> Halves:
    """The policy as the config lets it learn. The rest holds the policy's own arrays: whoever reads those too has no second copy."""
    section = setting.config.lora
    if not section.r:
        return Halves(policy.params, None)
    learned, rest = adapters(policy.params, key, r=section.r, alpha=section.alpha, targets=section.target_modules)
    return Halves(learned, sharding.place(rest, setting.mesh))


def whole(learned: Params, rest: Params | None) -> Params:
    """The parameters of an ordinary model: adapters merged into their kernels."""
    return learned if rest is None else merged(joined(learned, rest))


def lora_slice(config: Config) -> dict[str, Any]:
    """What a policy stage depends on because of LoRA; nothing where it is off, so that those stages keep their hashes."""
    section = config.lora
    return {"lora": {"r": section.r, "alpha": section.alpha, "targets": sorted(section.target_modules)}} if section.r else {}


def fixed_models(
    setting: Setting,
    at_hand: dict[str, Params],
    scorer: Loaded,
    further: tuple[Done, ...] | None,
    *,
    reference: Done,
    sft: Done,
    rest: Params | None,
) -> RoundModels:
    """The models of a round that do not learn; one that is `at_hand` (parameters by the hash of their stage) is not read again.

    `further` are the members of an ensemble beside `scorer`; None where the reward is one model. `rest` is what lies under the adapters.
    With `model.offload_frozen` each goes to the host's memory before the next is read; a reference that is the base is needed and stays.
    """
    offloaded = setting.config.model.offload_frozen
    away = sharding.offload if offloaded else lambda params: params

    def params_of(done: Done) -> Params:
        if done.hash not in at_hand:
            return away(setting.load(done, head="lm").params)
        return at_hand[done.hash] if rest is not None else away(at_hand[done.hash])

    def member(done: Done) -> tuple[Params, float]:
        one = setting.load(done, head="scalar")
        return away(one.params), reward_bias(one)

    reward, bias = away(scorer.params), reward_bias(scorer)
    if further is not None:
        others = [member(done) for done in further]
        reward, bias = (reward, *(params for params, _ in others)), (bias, *(its for _, its in others))
    return RoundModels(
        reference=params_of(reference),
        reward=reward,
        reward_bias=bias,
        sft=params_of(sft) if reference.hash != sft.hash else None,
        base=None if rest is None else {"policy": rest},
        offloaded=offloaded,
    )
