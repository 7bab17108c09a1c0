"""What does not learn in a round: the base under a policy's adapters, and the reference, reward and SFT models."""

from typing import Any, NamedTuple

import jax

from jaxrlhf import sharding
from jaxrlhf.algorithms.ppo import RoundModels
from jaxrlhf.config import Config
from jaxrlhf.models.hub import Loaded, reward_bias
from jaxrlhf.models.lora import adapters
from jaxrlhf.pipeline.stages.context import RoundInputs, RunContext
from jaxrlhf.storage.stage import Done
from jaxrlhf.types import Params


class SplitParams(NamedTuple):
    """A policy's parameters: what learns, and the frozen part. Without LoRA all of it learns and `frozen` is None."""

    trainable: Params
    frozen: Params | None


def split_params(run: RunContext, policy: Loaded, key: jax.Array) -> SplitParams:
    """The policy as the config lets it learn. `frozen` holds the policy's own arrays: whoever reads those too has no second copy."""
    section = run.config.lora
    if not section.r:
        return SplitParams(policy.params, None)
    trainable, frozen = adapters(policy.params, key, r=section.r, alpha=section.alpha, targets=section.target_modules)
    return SplitParams(trainable, sharding.place(frozen, run.mesh))


def lora_slice(config: Config) -> dict[str, Any]:
    """What a policy stage depends on because of LoRA; nothing where it is off, so that those stages keep their hashes."""
    section = config.lora
    return {"lora": {"r": section.r, "alpha": section.alpha, "targets": sorted(section.target_modules)}} if section.r else {}


def fixed_models(
    run: RunContext, given: RoundInputs, loaded: dict[str, Params], bias: float, *, ensemble: bool, frozen: Params | None
) -> RoundModels:
    """The models of a round that do not learn; one that is `loaded` already (parameters by the hash of their stage) is not read again.

    The first of `given.rewards`, whose bias is `bias`, is loaded; the others are the further members of an ensemble. `frozen` is what lies
    under the adapters. `loaded` is used up: a caller that holds its models nowhere else has none in memory that the round does not need.
    With `model.offload_frozen` each goes to the host's memory before the next is read; a reference that is the base is needed and stays.
    """
    rewards, reference, sft = given.rewards, given.reference, given.sft
    offloaded = run.config.model.offload_frozen
    away = sharding.offload if offloaded else lambda params: params

    def params_of(done: Done) -> Params:
        if done.hash not in loaded:
            return away(run.load(done, head="lm").params)
        params = loaded.pop(done.hash)
        return params if frozen is not None else away(params)

    def member(done: Done) -> tuple[Params, float]:
        one = run.load(done, head="scalar")
        return away(one.params), reward_bias(one)

    for hash in loaded.keys() - {rewards[0].hash, reference.hash, sft.hash}:
        del loaded[hash]
    first = away(loaded.pop(rewards[0].hash))
    others = [member(done) for done in rewards[1:]] if ensemble else []
    return RoundModels(
        reference=params_of(reference),
        reward=(first, *(params for params, _ in others)) if ensemble else first,
        reward_bias=(bias, *(its for _, its in others)) if ensemble else bias,
        sft=params_of(sft) if reference.hash != sft.hash else None,
        base=None if frozen is None else {"policy": frozen},
        offloaded=offloaded,
    )
