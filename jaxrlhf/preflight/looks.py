"""All checks in the order of a run."""

from collections.abc import Iterator
from functools import partial

from jaxrlhf.algorithms.rounds import PREFERENCE, SECTIONS_READ
from jaxrlhf.comparison.judge_client import Judge, check_judge
from jaxrlhf.config import Config
from jaxrlhf.pipeline import checks
from jaxrlhf.pipeline.loop import not_the_sampler, other_temperature
from jaxrlhf.preflight import models, rows, training
from jaxrlhf.preflight.screen import GREEN, YELLOW, Check, Found, Look, run_looks
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
    Look("recipe", "settings", settings, (*ALL, "policy_update")),
    Look("recipe", "judge", judge, ()),
    Look("recipe", "temperatures", temperatures, ("ppo", "evaluation", "weights", "pairs", "reward_update", "policy_update")),
    Look("recipe", "every step traced", training.traced, ALL),
    Look("data", "lengths", rows.lengths, TEXT),
    Look("data", "EOS", rows.eos, TEXT),
    Look("data", "sides", rows.sides, TEXT),
    Look("data", "floor", rows.floor, TEXT),
    Look("data", "duplicates", rows.duplicates, (*TEXT, "evaluation")),
    Look("data", "gold", rows.gold, (*TEXT, "gold")),
    Look("models", "weights", models.weights, MODELS),
    Look("models", "tokenizer", models.tokenizer, (*MODELS, "gold")),
    Look("models", "padding", models.padding, MODELS),
    Look("models", "first rollout", models.rollout, (*MODELS, "lora", "sft", "policy_update")),
    Look("models", "embeddings", models.embeddings, (*TEXT, "encoder", "reward_update")),
    Look("training", "SFT gradient", training.sft, (*MODELS, "sft")),
    Look("training", "reward gradient", training.reward, PAIRS),
    Look("training", "reward update", training.update, (*PAIRS, "reward_update")),
    Look("training", "policy gradient", training.policy, (*MODELS, "lora", "dpo", "policy_update")),
    Look("cost", "memory and time", training.cost, ALL),
)


def preflight(config: Config, judge: Judge | None = None) -> Iterator[Check]:
    """All checks of all arms of a recipe, as they are done."""
    return run_looks(LOOKS, {name: partial(Subject, one, judge) for name, one in arms(config).items()})
