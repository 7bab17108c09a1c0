"""OCRM: the reward model is refitted on all pairs, each weighted by how much likelier the policy is to write it than π_SFT was.

Ackermann, Ishida, Sugiyama (2025), Off-Policy Corrected Reward Modeling for RLHF.
"""

from __future__ import annotations

from dataclasses import asdict

import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms.update import Pairs, RoundContext
from jaxrlhf.config import WeightsConfig
from jaxrlhf.data.columns import column_header
from jaxrlhf.data.pairs import dataset_hash
from jaxrlhf.data.tokens import tokenizer_fingerprint
from jaxrlhf.losses import eta_for_ess, importance_weights, relative_log_ratio, weight_summary
from jaxrlhf.models.hub import Loaded
from jaxrlhf.offline.logprobs import cached_pair_logps, pair_logps

# The public code adds this to the mixture before its logarithm; in float32 that decides the result below about −83 nats.
COMPAT_FLOOR = 1e-36


def importance_weighted(context: RoundContext, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """All pairs, with w = exp(η · [log r_α(y⁺) + log r_α(y⁻)]) of the current policy against π_SFT."""
    weights = context.config.weights
    policy = _logps(context, pairs, context.policy, context.policy_hash, "log-probs under the policy")
    sft = _logps(context, pairs, context.sft, context.sft_hash, "log-probs under π_SFT")
    weights_N, report = weights_of(policy, sft, weights)
    context.report({**report, "needs_sampler": True})
    return pairs, weights_N


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


def _logps(context: RoundContext, pairs: Pairs, model: Loaded, model_hash: str, what: str) -> dict[str, np.ndarray]:
    """Log-probs of all pairs under one model, from disk where that model has seen this data set before."""
    config = context.config.weights
    header = column_header(
        dataset=dataset_hash(pairs.rows),
        model=model_hash,
        tokenizer=tokenizer_fingerprint(model.tokenizer),
        temperature=config.temperature,
        limits=asdict(context.config.data.limits),
        max_tokens=config.max_tokens,
    )
    folder = context.columns / f"logps-{context.fingerprint(header)}"
    return cached_pair_logps(
        folder,
        pairs.ids,
        header,
        lambda: pair_logps(
            model.model,
            model.params,
            pairs.tokens,
            temperature=config.temperature,
            batch_size=config.batch_size,
            max_tokens=config.max_tokens,
            mesh=context.mesh,
            progress=context.progress(what),
        ),
    )
