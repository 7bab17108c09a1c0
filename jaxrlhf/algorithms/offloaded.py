"""Scoring a rollout with frozen models that wait in the host's memory: one of them at a time is on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.losses.ensemble import ensemble_score
from jaxrlhf.rollouts.credit import CreditRule
from jaxrlhf.rollouts.score import Readings, RolloutModels, assemble_rollout, read_rollout
from jaxrlhf.types import Array, Metrics, Rollout


def all_metrics(metrics: Metrics, controller: dict) -> Metrics:
    """The metrics of a rollout with the round's coefficient; where the reference is π_SFT the two KLs are one number (the k1 form)."""
    return {"kl/sft": metrics["rollout/kl"], **metrics, "kl/coef": controller["kl_coef"]}


def _compiled(part: RolloutModels, mesh: Any, reading: dict[str, Any]) -> sharding.Compiled:
    """(params, texts, bias) → what the models of `part` say of the texts."""

    def make(axis_name: str | None):
        def read(params: dict, texts: tuple, bias: Array) -> tuple[Readings, Metrics]:
            none = None if part.reward is not None else jnp.zeros(texts[1].mask_BT.shape[0])
            biases = {"reward_bias": bias, "value_bias": bias}
            prompts, completion = texts
            return read_rollout(part, params, prompts, completion, scores_B=none, axis_name=axis_name, **biases, **reading), {}

        return read

    return sharding.rows_and_metrics(make, mesh)


def score_offloaded(
    models: RolloutModels,
    credit: CreditRule,
    mesh: Any,
    *,
    reading: dict[str, Any],
    assembling: dict[str, Any],
    spread_coef: float | None,
) -> Callable[..., tuple[Rollout, Metrics]]:
    """(params, (prompts, completion), controller, reward_bias) → (Rollout, metrics), as `score_rollout`, in one compiled pass a model.

    Of `params` "reference", "sft" and "reward" may be offloaded (`sharding.offload`). Each is brought over for its pass and dropped
    after it, before the next one comes: the device never holds two of them. `reading` and `assembling` are the options of
    `read_rollout` and of `assemble_rollout`.
    """
    own = _compiled(RolloutModels(models.policy, None, critic=models.critic), mesh, reading)
    logps = _compiled(RolloutModels(None, models.reference), mesh, reading)
    scores = _compiled(RolloutModels(None, None, reward=models.reward), mesh, reading)

    def make_whole(axis_name: str | None):
        def whole(controller: dict, batch: tuple) -> tuple[Rollout, Metrics]:
            (prompts, completion), readings, members = batch
            if spread_coef is not None:
                score, spread = ensemble_score(jnp.stack(members, axis=1), spread_coef=spread_coef)
                readings = readings._replace(scores_B=score, spread_B=spread)
            rule = partial(credit, kl_coef=controller["kl_coef"])
            rollout, metrics = assemble_rollout(prompts, completion, readings, credit=rule, axis_name=axis_name, **assembling)
            return rollout, all_metrics(metrics, controller)

        return whole

    together = sharding.rows_and_metrics(make_whole, mesh)

    def score(params: dict, texts: tuple, controller: dict, reward_bias: Any) -> tuple[Rollout, Metrics]:
        def turn(passed: sharding.Compiled, name: str, given: Any, bias: Any = 0.0) -> Readings:
            # Waiting here is what lets go of the model: what is brought over next finds its place.
            read = jax.block_until_ready(passed({name: sharding.to_device(given)}, texts, np.float32(bias))[0])
            # What was brought is committed to its device, and so is what was made of it: the state would be too, and be compiled for anew.
            return sharding.uncommitted(read, mesh)

        learning = {name: params[name] for name in ("policy", "critic") if name in params}
        readings = own(learning, texts, controller.get("value_bias", np.float32(0.0)))[0]
        readings = readings._replace(reference_logp_BT=turn(logps, "reference", params["reference"]).reference_logp_BT)
        if "sft" in params:
            readings = readings._replace(sft_logp_BT=turn(logps, "reference", params["sft"]).reference_logp_BT)
        ensemble = (params["reward"], reward_bias) if spread_coef is not None else ((params["reward"],), (reward_bias,))
        members = tuple(turn(scores, "reward", one, bias).scores_B for one, bias in zip(*ensemble, strict=True))
        return together(controller, (texts, readings._replace(scores_B=members[0]), members))

    return score
