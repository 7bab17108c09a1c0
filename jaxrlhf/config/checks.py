"""Check a config for values that are out of range or contradict each other, before anything is read."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

from jaxrlhf.config.names import run_name_fault
from jaxrlhf.config.run import Config

# The whole numbers that may be 0, which means none or off; all others are at least 1.
_MAY_BE_ZERO = ("seed", "sft_seed", "warmup_steps", "max_steps", "top_k", "bucket", "critic_warmup_updates", "length_turn", "r")


def _unfit_numbers(section: Any, prefix: str = "") -> Iterator[str]:
    """Numbers that no setting takes, whatever it means: NaN and infinity, and whole ones below their least value or over 64 bits."""
    for field in dataclasses.fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _unfit_numbers(value, f"{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{key} is {value}; it must be a finite number."
        elif isinstance(value, str | tuple) and re.search("[\0\ud800-\udfff]", "".join(value)):
            yield f"{key} is {value!r}; no name and no text of a recipe has a NUL or half of a character in it."
        elif isinstance(value, int) and not isinstance(value, bool):
            least = 0 if field.name in _MAY_BE_ZERO else 1
            of_mesh = prefix == "mesh."  # its −1 means all remaining devices; make_mesh checks the axes
            if value < least and not of_mesh and isinstance(field.default, int | None):
                yield f"{key} is {value}; it must be at least {least}."
            if abs(value) >= (bound := 2 ** (64 if field.name.endswith("seed") else 63)):
                yield f"{key} is {value}; it must be below 2**{bound.bit_length() - 1}."


def truths_as_numbers(raw: Mapping[str, Any], section: Any, prefix: str = "") -> Iterator[str]:
    """true, yes or on where a number is asked for: it would be read as 1."""
    for key, value in raw.items():
        found = getattr(section, key)
        if dataclasses.is_dataclass(found) and isinstance(value, Mapping):
            yield from truths_as_numbers(value, found, f"{prefix}{key}.")
        elif isinstance(value, bool) and isinstance(found, int | float) and not isinstance(found, bool):
            yield f"{prefix}{key} is {value}; it must be a number."


def contradictions(config: Config) -> Iterator[str]:
    """A sentence for each fault of the config, with the way out."""
    faults = list(_unfit_numbers(config)) or list(_out_of_range(config))
    yield from faults
    if not faults:  # what follows divides by them
        yield from _contradicting(config)


# Key → (what fits, what to say where the value does not). An infinite or missing number is a fault before it gets here.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "ppo.temperature": (lambda x: x > 0, "greedy sampling does not explore, give a number above 0"),
    "ppo.top_p": (lambda x: 0 < x <= 1, "it is the probability kept, 0 < top_p ≤ 1, and 1 keeps every token"),
    "ppo.gamma": (lambda x: 0 <= x <= 1, "it must lie in [0, 1]"),
    "ppo.lam": (lambda x: 0 <= x <= 1, "it must lie in [0, 1]"),
    "ppo.dual_clip": (lambda x: x is None or x > 1, "it bounds a ratio from above and must be above 1 (3 is usual), or left out"),
    "pairs.temperature": (lambda x: x > 0, "greedy sampling gives the same response twice, give a number above 0"),
    "pairs.label_flip": (lambda x: 0 <= x < 0.5, "it must lie in [0, 0.5), beyond that labels say the opposite"),
    "dpo.label_smoothing": (lambda x: 0 <= x < 0.5, "it must lie in [0, 0.5), beyond that labels say the opposite"),
    "filter.threshold": (lambda x: x is None or -1 <= x <= 1, "it is a cosine, which lies in [-1, 1]"),
    "filter.temperature": (lambda x: x >= 0, "it must be at least 0 (0 is greedy)"),
    "filter.top_p": (lambda x: 0 < x <= 1, "it must lie in (0, 1], and 1 keeps every token"),
    "synthesize.temperature": (lambda x: x > 0, "greedy sampling gives the same response every time, give a number above 0"),
    "synthesize.confidence": (lambda x: 0 < x <= 1, "it is the share of a prompt's responses in one cluster, 0 < confidence ≤ 1"),
    "synthesize.similarity": (lambda x: -1 <= x <= 1, "it is a cosine, which lies in [-1, 1]"),
    "synthesize.num_samples": (lambda x: x >= 2, "a pair needs at least 2 responses to a prompt"),
    "refit.kl_budget": (lambda x: x > 0, "it is in nats a response and must be above 0, refit.when: round refits every round"),
    "refit.ess_floor": (lambda x: 0 < x <= 1, "it is a share of the pairs, 0 < ess_floor ≤ 1"),
    "refit.accuracy_drop": (lambda x: x >= 0, "it is how far the accuracy falls and must be at least 0"),
    "evaluation.temperature": (lambda x: x >= 0, "it must be at least 0 (0 is greedy)"),
    "checkpoint.minutes": (lambda x: x is None or x > 0, "it must be above 0 (null: checkpoints by steps alone, checkpoint.every)"),
    "weights.alpha": (lambda x: 0 <= x < 1, "the relative ratio needs 0 ≤ alpha < 1"),
    "weights.temperature": (lambda x: x > 0, "log-probs need a temperature above 0"),
    "weights.eta": (lambda x: x == "ess" or x >= 0, "it must be at least 0 (0: no correction) or ess; below 0 it prefers unlikely pairs"),
}
# Numbers of the optimizers, PPO and DPO that must be above 0 where they are given, and those that may be 0.
_POSITIVE = ("learning_rate", "critic_learning_rate", "adam_epsilon", "max_grad_norm", "kl_target", "cliprange", "cliprange_high",
             "cliprange_value", "beta", "wpo_clip")  # fmt: skip
_NOT_NEGATIVE = ("weight_decay", "kl_coef", "kl_coef_previous", "vf_coef", "center_rewards_coefficient", "missing_eos_penalty",
                 "spread_coef")  # fmt: skip


def _out_of_range(config: Config) -> Iterator[str]:
    """Numbers outside of their range."""
    shape, weights = config.model.shape, config.weights
    if (fault := run_name_fault(config.name)) is not None:
        yield f"name is {config.name!r}, which {fault}; it is the name of the run's folder inside of output."
    if config.model.source is None and shape.hidden_size % shape.num_heads:
        fits = max(shape.hidden_size // shape.num_heads, 1) * shape.num_heads
        yield f"model.shape.hidden_size {shape.hidden_size} does not divide over num_heads {shape.num_heads}; try {fits}."
    for key, (fits, rule) in _RANGES.items():
        if not fits(value := attrgetter(key)(config)):
            yield f"{key} is {value}; {rule}."
    yield from _training_out_of_range(config)
    if weights.eta == "ess" and not 0 < weights.ess_target <= 1:
        yield f"weights.ess_target is {weights.ess_target}; it is the share of pairs that should count, 0 < ess_target ≤ 1."


def _training_out_of_range(config: Config) -> Iterator[str]:
    """SFT, reward training, PPO and DPO."""
    for part in ("sft", "reward", "ppo", "dpo"):
        given = {key: value for key, value in dataclasses.asdict(getattr(config, part)).items() if value is not None}
        for key, value in given.items():
            if key in _POSITIVE and not value > 0:
                yield f"{part}.{key} is {value}; it must be above 0."
            elif key in _NOT_NEGATIVE and not value >= 0:
                yield f"{part}.{key} is {value}; it must be at least 0."
            elif key.startswith("adam_beta") and not 0 <= value < 1:
                yield f"{part}.{key} is {value}; it must lie in [0, 1)."


def _warm_ups(config: Config) -> Iterator[str]:
    """Warm-ups longer than their training. Without max_steps the length depends on the data, which is not known here."""
    ppo = config.ppo
    for name, section in (("sft", config.sft), ("reward", config.reward), ("dpo", config.dpo)):
        if section.max_steps and section.warmup_steps >= section.max_steps:
            yield (
                f"{name}.warmup_steps {section.warmup_steps} leaves nothing of {name}.max_steps {section.max_steps}; "
                "the learning rate would only rise; lower it."
            )
    updates = ppo.total_episodes // ppo.batch_size
    if ppo.critic_warmup_updates >= updates:
        yield (
            f"ppo.critic_warmup_updates {ppo.critic_warmup_updates} leaves the policy none of the {updates} updates of a round "
            "(total_episodes / batch_size); lower it."
        )
    steps = max(updates - ppo.critic_warmup_updates, 0) * ppo.num_ppo_epochs * ppo.num_mini_batches
    if 0 < steps <= ppo.warmup_steps:
        yield f"ppo.warmup_steps {ppo.warmup_steps} leaves nothing of the policy's {steps} optimizer steps of a round; lower it."


def _contradicting(config: Config) -> Iterator[str]:
    """Settings that contradict each other."""
    ppo, data = config.ppo, config.data
    for name in ("forward_batch_size", "generation_batch_size"):
        size = getattr(ppo, name)
        if size is not None and ppo.batch_size % size:
            yield f"ppo.batch_size {ppo.batch_size} does not divide into passes of ppo.{name} {size}."
    margin = "reward.use_margin is set" if config.reward.use_margin else "reward.loss is 'bradley_terry_margin'"
    if (config.reward.use_margin or config.reward.loss == "bradley_terry_margin") and config.pairs.source == "sample":
        yield f"{margin}, but sampled pairs (pairs.source: sample) have no margins; take the loss without."
    if config.weights.reference_compat and config.weights.alpha == 0:
        yield "weights.reference_compat is a floor inside the relative ratio; with weights.alpha 0 there is none, unset it."
    if config.pairs.source == "data" and config.pairs.label_flip:
        yield "pairs.label_flip is for sampled pairs; the labels of pairs.source: data are taken as they are, set it to 0."
    if ppo.missing_eos_penalty is not None and ppo.missing_eos_score is not None:
        yield "ppo.missing_eos_penalty subtracts and ppo.missing_eos_score replaces; set at most one of them."
    if ppo.total_episodes >= ppo.batch_size:
        yield from _warm_ups(config)
    else:
        yield f"ppo.total_episodes {ppo.total_episodes} is less than one batch of {ppo.batch_size}; raise it or lower ppo.batch_size."
    parts = ppo.num_mini_batches * ppo.gradient_accumulation_steps
    if ppo.batch_size % parts:
        fits = max(ppo.batch_size // parts, 1) * parts
        yield f"ppo.batch_size {ppo.batch_size} does not divide into num_mini_batches × gradient_accumulation_steps = {parts}; try {fits}."
    for name, section in (("sft", config.sft), ("reward", config.reward), ("dpo", config.dpo)):
        if section.batch_size % section.gradient_accumulation_steps:
            parts = section.gradient_accumulation_steps
            yield f"{name}.batch_size {section.batch_size} does not divide by gradient_accumulation_steps {parts}."
        if section.load_best_model_at_end and section.eval_steps is None:
            yield f"{name}.load_best_model_at_end keeps the best look at held-out rows, and {name}.eval_steps asks for none; give it."
    if config.filter.n is None and config.filter.threshold is None:
        yield "filter.n and filter.threshold are both null, which would keep every pair; give one of them."
    if config.filter.rule == "half-half" and config.filter.n is None:
        yield "filter.rule is 'half-half', which fills each half up to filter.n / 2; give filter.n."
    if config.filter.k > 1 and config.filter.compare == "own":
        yield f"filter.k is {config.filter.k}, but filter.compare 'own' has one generation a pair; set filter.compare: nearest, or k: 1."
    if config.filter.k > config.filter.num_prompts:
        yield f"filter.k {config.filter.k} is more than the {config.filter.num_prompts} generations of filter.num_prompts; lower it."
    when = config.refit.when
    if when == "accuracy" and config.gold.kind == "none":
        yield "refit.when is 'accuracy', which gold measures, but gold.kind is 'none'; name a gold scorer, or refit by kl or ess."
    if when in ("kl", "accuracy") and config.evaluation.temperature == 0:
        yield (
            f"refit.when is {when!r}, which is measured on samples of the policy, but evaluation.temperature 0 is greedy; "
            "give a temperature above 0, or refit by ess."
        )
    if config.gold.kind in ("model", "function") and not config.gold.source:
        wanted = "folder" if config.gold.kind == "model" else "module:attribute"
        yield f"gold.kind is {config.gold.kind!r} but gold.source is empty; name the {wanted}."
    if config.gold.kind == "toy" and data.train != "toy":
        yield (
            f"gold.kind is 'toy' but data.train is {data.train!r}; the toy gold reads toy posts only. "
            "Set gold.kind: none, model or function."
        )
    if config.pairs.source == "sample" and config.gold.kind == "none":
        yield "pairs.source is 'sample' but gold.kind is 'none'; sampled pairs need a gold scorer to label them."
    if data.train == "toy" and config.pairs.source == "data":
        yield "data.train is 'toy', which has no ready-made pairs; set pairs.source: sample and gold.kind: toy."
    if not 0 < data.valid_fraction < 1 and data.valid is None:
        yield f"data.valid_fraction is {data.valid_fraction}; without data.valid it must lie between 0 and 1."
