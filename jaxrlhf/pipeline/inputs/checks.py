"""Models, gold and data that cannot be found or do not fit together are refused before anything is built."""

from __future__ import annotations

from typing import Any

from jaxrlhf.config import Config
from jaxrlhf.data import toy
from jaxrlhf.data.pairs import read_demonstrations, read_pairs, read_prompts
from jaxrlhf.data.read_report import DataError
from jaxrlhf.models import DecoderConfig
from jaxrlhf.models.hub import check_vocabulary, read_config, resolve
from jaxrlhf.pipeline.inputs.gold import scored_by_leader, try_gold
from jaxrlhf.pipeline.inputs.rows import TOY, _options, pairs_of
from jaxrlhf.scorers.function import function_scorer


def check(config: Config, tokenizer: Any = None, *, columns: tuple[str, ...] = ()) -> None:
    """Raise before anything is built where a model, gold or data cannot be found, do not fit together, or data have no usable row.

    Hub ids are fetched here and not hours later; data are read to the first usable row of each source, pairs to their end where the reward
    loss reads a column `margin` (`columns`).
    """
    data, options = config.data, _options(config, tokenizer)
    for model in (config.model.source, config.gold.source if config.gold.kind == "model" else None):
        if model is not None:
            resolve(model)
    if config.model.source is not None:
        check_model(config, read_config(resolve(config.model.source)), tokenizer)
    gold = scored_by_leader(function_scorer(config.gold.source or "")) if config.gold.kind == "function" else None
    if data.train == TOY:
        try_gold(gold, toy.prompts(data.toy, 2, config.text_seed, "evaluation"))
        return
    rows = read_prompts if config.pairs.source == "sample" else read_pairs
    for read, sources in (
        (rows, data.train),
        (rows, data.valid),
        (read_demonstrations, data.demonstrations or data.train),
        (read_prompts, data.prompts),
    ):
        if sources is not None:
            read(sources, limit=1, **options)
    if gold is not None:
        try_gold(gold, read_prompts(data.train, limit=2, **options)[0])
    if "margin" in columns and all(pair.margin is None for pair in pairs_of(config, tokenizer)[0]):
        raise DataError(f"the reward loss reads a margin, and no pair of {data.train} has one; unset reward.use_margin or add the field.")


def check_model(config: Config, model: DecoderConfig, tokenizer: Any) -> None:
    """ValueError where the base model has no embedding for an id of the tokenizer, or none for a position of the longest text."""
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.vocab_size)
    prompt, response = config.data.limits.max_prompt_length, max(config.data.limits.max_response_length, config.ppo.response_length)
    if model.positions == "learned" and prompt + response > model.max_positions:
        raise ValueError(
            f"prompts of {prompt} and responses of {response} tokens are {prompt + response} positions, and {config.model.source} has "
            f"learned {model.max_positions}; lower data.limits.max_prompt_length, data.limits.max_response_length or ppo.response_length."
        )
