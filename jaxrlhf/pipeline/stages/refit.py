"""Whether a round refits the reward model: a stage of its own, so that the decision is shared, logged and resumed like all else.

Three measures of how far the reward model in use is from what it was fitted for; each has its threshold in the config's `refit`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms.ocrm import logps_read
from jaxrlhf.data.tables import read_pair_table
from jaxrlhf.data.tokens import pad_id_of
from jaxrlhf.evaluation.diagnostics import agreement_with_gold
from jaxrlhf.evaluation.samples import read_samples
from jaxrlhf.losses import effective_sample_size, importance_weights, relative_log_ratio
from jaxrlhf.offline.logprobs import stored_pair_logps
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.pipeline.stages.ensemble import reward_inputs, reward_scores, spread_of
from jaxrlhf.pipeline.stages.evaluation import kl_to
from jaxrlhf.pipeline.stages.pairs import TRAIN
from jaxrlhf.storage.stage import Done, Stage

Measured = tuple[float | None, dict[str, Any]]  # the value (None: there was nothing to measure), and what else the record says of it


class RefitInputs(NamedTuple):
    """What is compared before round `number`: the last policy and its evaluation, and those that the reward models were fitted for."""

    number: int
    policy: Done
    evaluation: Done
    fitted_for: Done
    evaluation_then: Done
    rewards: tuple[Done, ...]  # one model, or the members of an `ensemble`
    ensemble: str | None
    rounds: int  # trained since the last refit
    pairs: Done


def refit_stage(run: RunContext, since: RefitInputs) -> Done:
    """The decision before a round; its result is {"when", "value", "threshold", "due", "forced", "rounds", …}.

    From `refit.max_rounds` rounds on a refit is due whatever the value (`forced`). A value that cannot be taken (gold ties all samples)
    makes no refit due.
    """
    number, rounds = since.number, since.rounds
    section = run.config.refit
    measure, threshold = MEASURES[section.when], float(getattr(section, THRESHOLDS[section.when]))
    forced = section.max_rounds is not None and rounds >= section.max_rounds

    def build(folder: Path) -> dict[str, Any]:
        value, facts = measure.of(run, since)
        if value is not None and not np.isfinite(value):
            raise ValueError(f"refit.when {section.when}: the measure before round {number} is {value}; the policy has diverged.")
        due = forced or (value is not None and measure.due(value, threshold))
        result = {"when": section.when, "value": value, "threshold": threshold, "due": due, "forced": forced, "rounds": rounds}
        result |= facts
        figures = {f"refit/{name}": float(x) for name, x in result.items() if isinstance(x, bool | int | float)}
        with run.log.stage("refit", round=number, total_steps=1, folder=folder) as stage:
            stage.step(1, figures)
        return result

    slice_ = {"when": section.when, "threshold": threshold, "forced": forced, "rounds": rounds, **measure.reads(run, since)}
    done = run.build(Stage(f"r{number}-refit", "data", "refit", slice_, measure.inputs(since)), build, round=number)
    run.log.note(decision_text(number, done.record["result"]))
    return done


def decision_text(number: int, result: dict[str, Any]) -> str:
    """The decision in words."""
    value = "cannot be measured" if result["value"] is None else f"{result['value']:.3g} (threshold {result['threshold']:.3g})"
    forced = f", rounds since the last: {result['rounds']}" if result["forced"] else ""
    return f"round {number}: {MEASURES[result['when']].what} {value}{forced}: {'refit' if result['due'] else 'no refit'}"


def kl_measure(run: RunContext, since: RefitInputs) -> Measured:
    """KL(policy now ‖ policy of the last refit), nats a response: E_{y~π}[ log π(y) − log π_refit(y) ] (k1), at evaluation.temperature.

    On the two responses to every prompt of the last evaluation, which the policy now has written; `stderr` is over prompts.
    """
    policy = run.load(since.policy, head="lm")
    samples = read_samples(since.evaluation.folder, pad_id_of(policy.tokenizer))
    then = run.load(since.fitted_for, head="lm")
    names = [f"refit, response {side} of 2" for side in (1, 2)]
    both = zip(samples.tables, names, strict=True)
    sides_2N = [kl_to(run, policy, then, texts, name, "that of the last refit", since.number) for texts, name in both]
    kl_N = np.asarray(sides_2N, np.float64).mean(axis=0)  # a prompt's two responses are one observation
    n = len(kl_N)
    stderr = float(kl_N.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return float(kl_N.mean()), {"stderr": stderr, "samples": 2 * n}


def ess_measure(run: RunContext, since: RefitInputs) -> Measured:
    """Share of the training pairs that still count under the ratio of the policy now to that of the last refit (`ess_share`)."""
    config = run.config
    rows, tokens = read_pair_table(since.pairs.folder / TRAIN)

    def logps(done: Done, what: str) -> dict[str, np.ndarray]:
        how = run.kept(f"refit, pairs under {what}", round=since.number)
        loaded = run.load(done, head="lm")
        given = {"model_hash": done.hash, "tokenizer": loaded.tokenizer, "mesh": run.mesh, **how}
        return stored_pair_logps(run.columns, rows, tokens, lambda: loaded, **given, **logps_read(config))

    now, then = logps(since.policy, "the policy"), logps(since.fitted_for, "that of the last refit")
    share = ess_share(now, then, alpha=config.weights.alpha)
    return share, {"ess": share * len(rows), "pairs": len(rows)}


def ess_share(now: dict[str, np.ndarray], then: dict[str, np.ndarray], *, alpha: float) -> float:
    """ESS / N of the weights w = r_α(y⁺) r_α(y⁻), r = π_now/π_then (α-relative), from the log-probs {"chosen_logp", "rejected_logp"} [N].

    η is 1: the question is how far the policy has moved, not how much of it OCRM would use. 1 where the two policies are equal.
    """
    chosen, rejected = (
        relative_log_ratio(jnp.asarray(now[name]), jnp.asarray(then[name]), alpha=alpha) for name in ("chosen_logp", "rejected_logp")
    )
    weights = importance_weights(chosen, rejected, eta=1.0, normalize="mean")  # the scale cancels, and does not overflow
    return float(effective_sample_size(weights)) / len(weights)


def accuracy_measure(run: RunContext, since: RefitInputs) -> Measured:
    """How far the reward model's accuracy has fallen, from the samples of the policy it was fitted for to those of the policy now.

    On the two responses to every prompt of an evaluation, as gold orders them; ties of gold are left out. An ensemble is judged by the
    one score its policy is trained on.
    """
    policy = run.load(since.policy, head="lm")._replace(params=None)  # its tokenizer is what is needed
    then, now = (read_samples(evaluation.folder, pad_id_of(policy.tokenizer)) for evaluation in (since.evaluation_then, since.evaluation))
    scores, _ = reward_scores(run, since.rewards, spread_of(since.ensemble, run.config), (*then.tables, *now.tables))
    assert then.gold is not None and now.gold is not None, "a config that refits by accuracy names a gold scorer"
    before, after = agreement_with_gold((scores[0], scores[1]), then.gold), agreement_with_gold((scores[2], scores[3]), now.gold)
    fall = None if before is None or after is None else before - after
    return fall, {"accuracy": after, "accuracy_then": before}


class Measure(NamedTuple):
    """One way to tell: what it measures, from which stages and settings, and on which side of its threshold a refit is due."""

    what: str
    of: Callable[[RunContext, RefitInputs], Measured]
    due: Callable[[float, float], bool]
    inputs: Callable[[RefitInputs], dict[str, Done]]
    reads: Callable[[RunContext, RefitInputs], dict[str, Any]]


def _weights_read(run: RunContext, since: RefitInputs) -> dict[str, Any]:
    del since
    read = {name: getattr(run.config.weights, name) for name in ("alpha", "temperature", "max_tokens")}
    return read | {"dtype": run.config.model.dtype}


THRESHOLDS: dict[str, str] = {"kl": "kl_budget", "ess": "ess_floor", "accuracy": "accuracy_drop"}

MEASURES: dict[str, Measure] = {
    "kl": Measure(
        "KL to the policy of the last refit, nats a response,",
        kl_measure,
        lambda value, budget: value > budget,
        lambda since: {"policy": since.policy, "fitted_for": since.fitted_for, "evaluation": since.evaluation},
        lambda run, since: {"temperature": run.config.evaluation.temperature, "dtype": run.config.model.dtype},
    ),
    "ess": Measure(
        "share of the pairs that count under what has changed since the last refit",
        ess_measure,
        lambda share, floor: share < floor,
        lambda since: {"policy": since.policy, "fitted_for": since.fitted_for, "pairs": since.pairs},
        _weights_read,
    ),
    "accuracy": Measure(
        "fall of the reward model's accuracy on the policy's own text",
        accuracy_measure,
        lambda fall, most: fall > most,
        lambda since: (
            reward_inputs(since.rewards)
            | {"policy": since.policy, "evaluation": since.evaluation, "evaluation_then": since.evaluation_then}
        ),
        lambda run, since: {"dtype": run.config.model.dtype, "spread_coef": spread_of(since.ensemble, run.config)},
    ),
}
