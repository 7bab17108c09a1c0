"""What the arms of a sweep are, in the words and numbers of its table."""

from collections.abc import Callable
from typing import Any

from jaxrlhf.algorithms.policy_updates import POLICY_UPDATES
from jaxrlhf.algorithms.ppo import num_updates
from jaxrlhf.algorithms.rounds import PREFERENCE, SECTIONS_READ, Method, method_of, num_rounds
from jaxrlhf.config import Config
from jaxrlhf.pipeline.stages.refit import THRESHOLDS
from jaxrlhf.plugins import plugin


def arm_facts(config: Config) -> dict[str, Any]:
    """What an arm is, in the table's words and numbers, read from its config."""
    method = method_of(config.method, config.row, plugin)
    rounds = num_rounds(method, config.rounds)
    preference = method.policy_update in PREFERENCE
    episodes = 0 if preference else num_updates(config.ppo) * config.ppo.batch_size * rounds
    samples = 1 if preference else POLICY_UPDATES[method.policy_update].samples(config.ppo)
    repeated = rounds if config.ppo.round_prompts == "same" else 1
    return {
        "method": config.method,
        "policy_update": method.policy_update,
        "reference": _reference(method, config, rounds),
        "reward": _reward(method, config, rounds),
        "restart": _restart(method, rounds),
        "rounds": rounds,
        "episodes": episodes,
        "prompts": episodes // samples // repeated,
        "response_length": config.ppo.response_length,
    }


def _reference(method: Method, config: Config, rounds: int) -> str:
    if method.policy_update in PREFERENCE:
        first = again = config.dpo.beta
    else:
        first, again = config.ppo.kl_coef, config.ppo.kl_coef
        if method.reference == "previous" and config.ppo.kl_coef_previous is not None:
            again = config.ppo.kl_coef_previous
    if method.reference == "sft" or rounds == 1:
        return f"SFT, β {first:g}"
    return f"previous, β {again:g}" + (f" (round 1: {first:g})" if again != first else "")


def _reward(method: Method, config: Config, rounds: int) -> str:
    """Which reward model the rounds after the first use."""
    if not method.needs_reward:
        return "–"
    several = f"{method.ensemble} of {config.reward.ensemble_size}".replace("-", " ") if method.ensemble else ""
    if method.reward_update is None or rounds == 1:
        return ", ".join(filter(None, ("kept", several)))
    parts = [f"refitted, {method.reward_update}"]
    parts += [_SECTIONS[name](config) for name in SECTIONS_READ.get(method.reward_update, ()) if name in _SECTIONS]
    parts += ["from the previous"] * (method.reward_start == "previous") + ["once"] * (method.update_rounds == "once")
    if config.refit.when != "round":
        parts.append(f"when {config.refit.when} passes {getattr(config.refit, THRESHOLDS[config.refit.when]):g}")
    return ", ".join(filter(None, (*parts, several)))


def _weights(config: Config) -> str:
    weights = config.weights
    eta = f"η for ESS {weights.ess_target:g} N" if weights.eta == "ess" else f"η {weights.eta:g}"
    return f"{eta}, α {weights.alpha:g}"


def _filter(config: Config) -> str:
    return f"{config.filter.rule} {config.filter.n or f'above {config.filter.threshold:g}'}"


_SECTIONS: dict[str, Callable[[Config], str]] = {
    "weights": _weights,
    "filter": _filter,
    "synthesize": lambda config: f"γ {config.synthesize.confidence:g}",
}


def _restart(method: Method, rounds: int) -> str:
    """What starts anew before every round: DPO's optimizer always does, and only PPO has a critic."""
    if rounds == 1:
        return "–"
    critic = method.policy_update in POLICY_UPDATES and POLICY_UPDATES[method.policy_update].critic
    anew = ["optimizer"] * (method.restart_optimizer or method.policy_update in PREFERENCE) + ["critic"] * (
        critic and method.restart_critic
    )
    return " + ".join(anew) or "nothing"
