"""Which programs a run has, in their order."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jaxrlhf.algorithms.rounds import PREFERENCE, SECTIONS_READ, Round
from jaxrlhf.plan.passes import encoder_phase, gold_phases, logprobs_phase, sampling_phases, scoring_phase
from jaxrlhf.plan.planner import Phase, Planner
from jaxrlhf.plan.training import preference_phases, reward_phases, rollout_phases, sft_phase


def phases_of(planner: Planner) -> list[Phase]:
    """Every program once for each set of what is in memory beside it."""
    found = [sft_phase(planner)]
    if planner.config.pairs.source == "sample":
        found += sampling_phases(
            planner, "pairs", planner.config.pairs.batch_size, {"policy": planner.policy}, planner.counts.pairs_sampled
        )
        found += gold_phases(planner, "pairs", {"policy": planner.policy}, planner.counts.pairs_sampled)
    rounds = planner.counts.rounds
    if any(one.fits_reward for one in rounds):
        found += reward_phases(planner, sum(one.fits_reward for one in rounds))
    for one in rounds:
        if one.reward_update is not None and one is next(r for r in rounds if r.reward_update is not None):
            found += update_phases(planner, one)
    found += policy_phases(planner)
    found += evaluation_phases(planner)
    return found


def update_phases(planner: Planner, round: Round) -> Iterator[Phase]:
    """What a reward update of the package computes on the devices; three models are loaded for it. Users' own are not known here."""
    config, counts = planner.config, planner.counts
    sections = SECTIONS_READ.get(round.reward_update or "", ())
    held = {"policy": planner.policy, "π_SFT": planner.policy, "reward": planner.scalar}
    updates = sum(one.reward_update is not None for one in counts.rounds)
    if "weights" in sections:
        w = config.weights
        width = min(planner.pairs_width(), w.max_tokens or planner.pairs_width())
        calls = counts.passes(counts.pairs, w.batch_size, 2 * (updates + 1))  # once under π_SFT
        yield logprobs_phase(planner, "update", "log-probs of pairs", w.batch_size, width, w.temperature, held, calls, "weights.batch_size")
    if "filter" in sections or "synthesize" in sections:
        own = "filter" if "filter" in sections else "synthesize"
        s = config.filter if own == "filter" else config.synthesize
        prompts = counts.pairs if own == "filter" and config.filter.compare == "own" else s.num_prompts
        how: dict[str, Any] = {"samples": updates if own == "filter" else updates * config.synthesize.num_samples, "knob": own}
        if own == "filter":
            f = config.filter
            how |= {"new_tokens": f.max_new_tokens, "greedy": f.temperature == 0, "top_k": f.top_k, "top_p": f.top_p}
        for one in sampling_phases(planner, "update", s.batch_size, held, prompts, **how):
            yield replace(one, held=held)  # gold is not asked
    if "encoder" in sections and planner.subjects.encoder is not None:
        yield encoder_phase(planner, held, updates)


def policy_phases(planner: Planner) -> Iterator[Phase]:
    """The programs of the policy's rounds: of every kind of round that differs in the models it holds."""
    kinds: dict[bool, list[Round]] = {}
    for one in planner.counts.rounds:
        kinds.setdefault(one.reference != 0, []).append(one)
    for moved, rounds in kinds.items():
        first = rounds[0].number
        suffix = "" if len(kinds) == 1 else " (round 1)" if not moved else f" (from round {first} on)"
        make = preference_phases if rounds[0].policy_update in PREFERENCE else rollout_phases
        yield from make(planner, rounds[0], moved, len(rounds), suffix)


def evaluation_phases(planner: Planner) -> Iterator[Phase]:
    """At the end of every round and after SFT: two responses a prompt, gold, log-probs under policy and π_SFT, the reward model."""
    config, counts, section = planner.config, planner.counts, planner.config.evaluation
    rounds, prompts, T = len(counts.rounds), counts.evaluation_prompts, planner.lengths[2]
    rows = section.batch_size if prompts is None else min(section.batch_size, prompts)
    held = {"policy": planner.policy}
    how = {"samples": 2 * (rounds + 1), "greedy": section.temperature == 0}
    yield from sampling_phases(planner, "evaluation", section.batch_size, held, prompts, **how)
    yield from gold_phases(planner, "evaluation", held, prompts, samples=3 * (rounds + 1))
    held = held | planner.gold_held
    calls = counts.passes(prompts, rows, 2 * rounds)
    logprobs = held | {"π_SFT": planner.policy}
    temperature = section.temperature or 1.0
    yield logprobs_phase(planner, "evaluation", "log-probs", rows, T, temperature, logprobs, calls, "evaluation.batch_size")
    if any(one.fits_reward for one in counts.rounds):
        members = config.reward.ensemble_size if counts.rounds[0].ensemble else 1
        calls = counts.passes(prompts, config.reward.eval_batch_size, 3 * rounds * members)
        size = config.reward.eval_batch_size if prompts is None else min(config.reward.eval_batch_size, prompts)
        scored = held | {"reward": planner.scalar}
        yield scoring_phase(planner, "evaluation", "reward scores", planner.scalar, T, size, scored, calls, "reward.eval_batch_size")
