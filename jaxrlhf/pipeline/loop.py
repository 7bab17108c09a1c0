"""The rounds of one method: which stage follows which."""

from dataclasses import dataclass, field
from typing import Any

from jaxrlhf.algorithms.rounds import PREFERENCE, Method, Round, method_of, num_rounds, round_of
from jaxrlhf.config import Config
from jaxrlhf.evaluation.intervals import proportion
from jaxrlhf.pipeline.stages.context import RoundInputs, RunContext
from jaxrlhf.pipeline.stages.evaluation import evaluation_stage
from jaxrlhf.pipeline.stages.pairs import pairs_stage
from jaxrlhf.pipeline.stages.policy import policy_stage
from jaxrlhf.pipeline.stages.preference import preference_stage
from jaxrlhf.pipeline.stages.refit import RefitInputs, decision_text, refit_stage
from jaxrlhf.pipeline.stages.reward import reward_stage
from jaxrlhf.pipeline.stages.reward_update import update_stage
from jaxrlhf.pipeline.stages.sft import sft_stage, tokenizer_stage
from jaxrlhf.pipeline.summary import Summary, accuracy_valid, update_report
from jaxrlhf.plugins import plugin
from jaxrlhf.storage.stage import Done

GREEDY = "greedy text (evaluation.temperature 0) under the policy at temperature 1"  # it has no density of its own
HEURISTIC = "the importance weights are a heuristic here, not the density ratio of the pairs"


@dataclass
class Track:
    """What the rounds so far have made; policies and evaluations stand at the number of their round, 0 is π_SFT."""

    policies: list[Done]
    evaluations: list[Done] = field(default_factory=list)
    rewards: tuple[Done, ...] = ()  # the reward model in use: one, or the members of an ensemble
    update: Done | None = None  # the reward update it was fitted by
    refitted: int = 0  # the policy it was fitted for
    last: Round | None = None
    decision: Done | None = None  # whether this round refits, where that was a question


def walk_through(run: RunContext, until: str | None) -> None:
    """The stages of one method, in order. What a round needs is one row of the table; nothing here knows a method's name."""
    config = run.config
    method = method_of(config.method, config.row, plugin)
    rounds = num_rounds(method, config.rounds)
    summary = Summary(run, rounds)
    samples = until in (None, "ppo") and method.policy_update not in PREFERENCE
    if samples and config.ppo.total_episodes % config.ppo.batch_size:
        summary.note(not_whole(config.ppo.total_episodes, config.ppo.batch_size))
    tokenizer = tokenizer_stage(run)
    sft = sft_stage(run, tokenizer)
    if until == "sft":
        return
    pairs = pairs_stage(run, tokenizer, sft)
    summary.baselines = pairs.record["result"]["baselines"]
    track = Track([sft])
    if until is None:
        track.evaluations.append(evaluation_stage(run, 0, policy=sft, sft=sft, rewards=(), ensemble=None, before=None))
        summary.add(None, track.evaluations[0])
    if rounds < config.rounds:
        summary.note(f"{config.method} has one round: a second one, from π_SFT on the same pairs, would repeat it.")
    if method.policy_update not in PREFERENCE and (other := other_temperature(config)):
        summary.note(other)
    for number in range(1, rounds + 1):
        round = _next_round(run, method, track, number, pairs)
        if track.decision is not None and not track.decision.record["result"]["due"]:
            summary.note(not_due(number, track.decision.record["result"], adapters=config.lora.r > 0))
        update = _reward(run, round, track, pairs)
        if until == "reward":
            return
        track.policies.append(_policy(run, method, round, track, pairs))
        if until == "ppo":
            return
        before = track.evaluations[round.policy_start]
        models = {"policy": track.policies[-1], "sft": sft, "rewards": track.rewards, "before": before}
        track.evaluations.append(evaluation_stage(run, number, ensemble=round.ensemble, **models))
        if update is not None and update_report(update).get("needs_sampler") and (reasons := not_the_sampler(config)):
            summary.note(f"{HEURISTIC}: {'; '.join(reasons)}.")
        summary.add(round, track.evaluations[-1], rewards=track.rewards, update=update, decision=track.decision)
        track.last = round


def _next_round(run: RunContext, method: Method, track: Track, number: int, pairs: Done) -> Round:
    """The row's round `number`, with or without a refit."""
    done = method.reward_update is None or (method.update_rounds == "once" and track.update is not None)
    always = number == 1 or done or run.config.refit.when == "round"
    if always:
        track.decision = None
    else:
        since = RefitInputs(
            number,
            policy=track.policies[-1],
            evaluation=track.evaluations[-1],
            fitted_for=track.policies[track.refitted],
            evaluation_then=track.evaluations[track.refitted],
            rewards=track.rewards,
            ensemble=track.last.ensemble if track.last else None,
            rounds=number - 1 - track.refitted,
            pairs=pairs,
        )
        track.decision = refit_stage(run, since)
    due = track.decision is None or track.decision.record["result"]["due"]
    return round_of(method, number, track.last, due=due, updated=track.update is not None)


def _reward(run: RunContext, round: Round, track: Track, pairs: Done) -> Done | None:
    """The round's reward update and the reward models fitted by it, put into `track`; the update, if the round has one."""
    update, sft = None, track.policies[0]
    if round.reward_update is not None:
        models = {"sft": sft, "policy": track.policies[-1], "reward": track.rewards[0]}
        update = update_stage(run, round, pairs=pairs, before=track.update, **models)
        track.update = update
    if round.fits_reward:
        track.refitted = round.number - 1
        members = run.config.reward.ensemble_size if round.ensemble else 1
        track.rewards = tuple(
            reward_stage(run, round, sft, track.rewards[n] if track.rewards else None, pairs, update, member=n) for n in range(members)
        )
        if (accuracy := accuracy_valid(track.rewards)) is not None:
            held_out = pairs.record["result"]["valid"]
            run.guards.see({"reward": proportion(accuracy * held_out, held_out)}, round=round.number, where="reward")
    return update


def _policy(run: RunContext, method: Method, round: Round, track: Track, pairs: Done) -> Done:
    """The policy of a round."""
    given = RoundInputs(
        sft=track.policies[0],
        start=track.policies[round.policy_start],
        reference=track.policies[round.reference],
        previous=track.policies[-1],
        pairs=pairs,
        rewards=track.rewards,
        update=track.update,
    )
    if round.policy_update in PREFERENCE:
        return preference_stage(run, round, given)
    more = round.number < num_rounds(method, run.config.rounds)
    skips = method.reward_update is not None and run.config.refit.when != "round"
    carries = more and (skips or not (method.restart_optimizer and method.restart_critic))
    return policy_stage(run, round, given, carries=carries)


def other_temperature(config: Config) -> str | None:
    """Why the rollouts' KL is not the evaluation's: a policy has one distribution, and so one KL, at each temperature."""
    trained, evaluated = config.ppo.temperature, config.evaluation.temperature
    if trained == evaluated:
        return None
    what = f"the policy at evaluation.temperature {evaluated:g}" if evaluated else GREEDY
    return (
        f"KL to SFT of an evaluation is that of {what}, and KL of a rollout that at ppo.temperature {trained:g}: they are two numbers of "
        "one policy, and differ."
    )


def not_the_sampler(config: Config) -> list[str]:
    """Why π_SFT, as the importance weights read it, is not what the pairs were drawn from; empty where it is."""
    pairs, weights = config.pairs, config.weights
    if pairs.source != "sample":
        return ["the pairs were not sampled from this run's SFT policy (pairs.source: sample)"]
    reasons = []
    if pairs.temperature != weights.temperature:
        reasons.append(
            f"the pairs were sampled at temperature {pairs.temperature} and are weighed at weights.temperature {weights.temperature}"
        )
    if weights.max_tokens is not None and weights.max_tokens < config.ppo.response_length:
        reasons.append(
            f"weights.max_tokens {weights.max_tokens} leaves out what follows in responses of up to {config.ppo.response_length}"
        )
    return reasons


def not_whole(episodes: int, size: int) -> str:
    """What is sampled of episodes that do not fill their last rollout batch."""
    done = episodes // size * size
    rule = f"ppo.total_episodes {episodes} is no multiple of ppo.batch_size {size}"
    return f"{rule}: every round samples {done}; give {done} or {done + size}."


def not_due(number: int, decision: dict[str, Any], *, adapters: bool) -> str:
    """Why round `number` has no refit, and what it goes on with: not the moments of adapters that the last round has merged."""
    kept = "reward model, reference and critic" if adapters else "reward model, reference, optimizer and critic"
    return f"{decision_text(number, decision)}; it goes on with the {kept} of the last one."
