"""OCRM: the reward model is refitted on all pairs, each weighted by how much likelier the policy is to write it than π_SFT was.

Ackermann, Ishida, Sugiyama (2025), Off-Policy Corrected Reward Modeling for RLHF.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms.reward_update import Pairs, RoundContext
from jaxrlhf.config import Config, WeightsConfig
from jaxrlhf.evaluation.weight_health import write_weight_health
from jaxrlhf.losses import eta_for_ess, importance_weights, relative_log_ratio, weight_summary
from jaxrlhf.offline.logprobs import stored_pair_logps

# The public code adds this to the mixture before its logarithm; in float32 that decides the result below about −83 nats.
COMPAT_FLOOR = 1e-36


def importance_weighted(context: RoundContext, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """All pairs, with w = exp(η · [log r_α(y⁺) + log r_α(y⁻)]) of the current policy against π_SFT.

    What the weights are like is reported, and written with a figure as weight_health.json and weight_health.svg.
    """
    weights = context.config.weights
    policy, sft = (
        stored_pair_logps(
            context.columns,
            *pairs,
            lambda model=model: model,
            model_hash=model_hash,
            tokenizer=model.tokenizer,
            mesh=context.mesh,
            **context.kept(f"log-probs under {name}"),
            **logps_read(context.config),
        )
        for model, model_hash, name in ((context.policy, context.policy_hash, "the policy"), (context.sft, context.sft_hash, "π_SFT"))
    )
    weights_N, report = weights_of(policy, sft, weights)
    health = write_weight_health(context.folder, weights_N, mean_lengths(pairs))
    context.report({**report, "length_correlation": health["length_correlation"], "needs_sampler": True})
    return pairs, weights_N


def mean_lengths(pairs: Pairs) -> np.ndarray:
    """Mean length of each pair's two responses, tokens with EOS [N]."""
    sides = (pairs.tokens.chosen_mask_BT, pairs.tokens.rejected_mask_BT)
    return np.mean([np.asarray(mask, bool).sum(axis=1) for mask in sides], axis=0)


def weights_of(policy: dict[str, np.ndarray], sft: dict[str, np.ndarray], config: WeightsConfig) -> tuple[np.ndarray, dict[str, float]]:
    """(weights_N, report) from the log-probs of both sides under both models, each {"chosen_logp", "rejected_logp"}."""
    floor = COMPAT_FLOOR if config.reference_compat else None
    chosen, rejected = (
        relative_log_ratio(jnp.asarray(policy[name]), jnp.asarray(sft[name]), alpha=config.alpha, floor=floor)
        for name in ("chosen_logp", "rejected_logp")
    )
    eta = float(eta_for_ess(chosen, rejected, target=config.ess_target)) if config.eta == "ess" else config.eta
    weights_N = importance_weights(chosen, rejected, eta=eta, normalize=config.normalize)
    summary = {name: float(value) for name, value in weight_summary(weights_N).items()}
    return np.asarray(weights_N), {"eta": eta, "alpha": config.alpha, "pairs": len(weights_N), **summary}


def logps_read(config: Config) -> dict[str, Any]:
    """What the weights read of log-probs, as the keywords of `stored_pair_logps`."""
    weights = config.weights
    read = {"temperature": weights.temperature, "max_tokens": weights.max_tokens, "batch_size": weights.batch_size}
    return {"limits": config.data.limits, **read}
