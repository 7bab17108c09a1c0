"""All checks in the order of a run."""

from collections.abc import Iterator
from functools import partial

from jaxrlhf.algorithms.rounds import PREFERENCE, SECTIONS_READ
from jaxrlhf.comparison.judge_client import Judge, check_judge
from jaxrlhf.config import Config
from jaxrlhf.pipeline import checks
from jaxrlhf.pipeline.loop import not_the_sampler, other_temperature
from jaxrlhf.preflight import models, rows, training
from jaxrlhf.preflight.screen import GREEN, YELLOW, Found, Line, Look, run_looks
from jaxrlhf.preflight.subject import ALL, MODELS, TEXT, Subject
from jaxrlhf.recipe import arms

PAIRS = (*MODELS, "reward", "needs_reward")


def settings(subject: Subject) -> Found:
    """What a run refuses before it builds anything: names, batches, positions, hub ids, the first rows of each file."""
    checks.check(subject.config)
    return Found(GREEN, "names, batches, positions, models and the first rows of all data are as a run needs them")


def judge(subject: Subject) -> Found | None:
    """The package and the key of a judge, where one will be asked."""
    if subject.judge is None:
        return None
    check_judge(subject.judge)
    return Found(GREEN, "the package and the key are here; nothing was sent")


def temperatures(subject: Subject) -> Found:
    """Temperatures that must be equal for a figure or a weight to mean what its name says."""
    config, weighed = subject.config, "weights" in SECTIONS_READ.get(subject.method.reward_update or "", ())
    faults = [f"the importance weights are a heuristic here: {reason}" for reason in (not_the_sampler(config) if weighed else ())]
    if subject.method.policy_update not in PREFERENCE and (other := other_temperature(config)):
        faults.append(other)
    figure = f"sampling {config.ppo.temperature:g}, evaluation {config.evaluation.temperature:g}"
    figure += f", weights {config.weights.temperature:g}" * weighed
    return Found(YELLOW if faults else GREEN, figure, "; ".join(faults))


LOOKS = (
    Look("settings", settings, (*ALL, "policy_update")),
    Look("judge", judge, ()),
    Look("temperatures", temperatures, ("ppo", "evaluation", "weights", "pairs", "reward_update", "policy_update")),
    Look("every step traced", training.traced, ALL),
    Look("lengths", rows.lengths, TEXT),
    Look("EOS", rows.eos, TEXT),
    Look("floor", rows.floor, TEXT),
    Look("duplicates", rows.duplicates, (*TEXT, "evaluation")),
    Look("gold", rows.gold, (*TEXT, "gold")),
    Look("weights", models.weights, MODELS),
    Look("tokenizer", models.tokenizer, (*MODELS, "gold")),
    Look("padding", models.padding, MODELS),
    Look("first rollout", models.rollout, (*MODELS, "lora", "policy_update")),
    Look("embeddings", models.embeddings, (*TEXT, "encoder", "reward_update")),
    Look("reward gradient", training.reward, PAIRS),
    Look("reward update", training.update, (*PAIRS, "reward_update")),
    Look("policy gradient", training.policy, (*MODELS, "lora", "dpo", "policy_update")),
    Look("memory and time", training.cost, ALL),
)


def preflight(config: Config, judge: Judge | None = None) -> Iterator[Line]:
    """All checks of all arms of a recipe, as they are done."""
    return run_looks(LOOKS, {name: partial(Subject, one, judge) for name, one in arms(config).items()})
