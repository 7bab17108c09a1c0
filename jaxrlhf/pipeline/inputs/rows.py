"""The rows that a run reads: demonstrations, pairs, prompts, and those that are held out."""

from __future__ import annotations

from typing import Any, TypeVar

from jaxrlhf.config import Config
from jaxrlhf.data import toy
from jaxrlhf.data.pairs import Demonstration, Pair, Prompt, ReadReport, read_demonstrations, read_pairs, read_prompts, split_by_prompt
from jaxrlhf.data.read_report import DataError
from jaxrlhf.data.tokens import Limits

TOY = "toy"
T = TypeVar("T", Pair, Demonstration, Prompt)


def limits_of(config: Config) -> Limits:
    limits = config.data.limits
    return Limits(limits.max_prompt_length, limits.max_response_length, limits.long_prompt, limits.long_response)


def _options(config: Config, tokenizer: Any) -> dict[str, Any]:
    data = config.data
    return {
        "tokenizer": tokenizer,
        "on_bad_row": data.on_bad_row,
        "prompt_format": data.prompt_format,
        "response_format": data.response_format,
        "rename": data.rename,
    }


def demonstrations_of(config: Config, tokenizer: Any = None) -> tuple[list[Demonstration], ReadReport]:
    """Text for SFT: its own file, else the chosen responses of the training pairs; less the prompts held out."""
    data = config.data
    if data.train == TOY:
        rows = toy.demonstrations(data.toy, data.num_demonstrations, config.text_seed)
        return rows, ReadReport(kept=len(rows))
    rows, report = read_demonstrations(data.demonstrations or data.train, **_options(config, tokenizer))
    if data.demonstrations is not None or data.valid is not None:
        return without_held_out(
            rows, report, held_out_of(config, tokenizer), "data.demonstrations" if data.demonstrations else "data.train"
        )
    held = {row.prompt for row in held_out_of(config, tokenizer)}
    rows = [row for row in rows if row.prompt not in held]
    report.kept = len(rows)
    return rows, report


def without_held_out(rows: list[T], report: ReadReport, held_out: list[Prompt], name: str) -> tuple[list[T], ReadReport]:
    """(rows, report) less those rows of another file whose prompt is held out; each is named in the report.

    An empty prompt is no prompt that two files could share. Raises DataError where no row is left.
    """
    held = {row.prompt for row in held_out} - {""}
    kept = [row for row in rows if row.prompt not in held]
    report.dropped += [(row.source, "held out: its prompt is among the held-out rows") for row in rows if row.prompt in held]
    report.kept = len(kept)
    if not kept:
        raise DataError(
            f"every row of {name} has a prompt that is also held out, so there is nothing to train on; give other held-out rows."
        )
    return kept, report


def pairs_of(config: Config, tokenizer: Any = None) -> tuple[list[Pair], list[Pair], ReadReport]:
    """(train, valid, report): the valid file and the training pairs on other prompts, or training pairs held out by prompt."""
    data, options = config.data, _options(config, tokenizer)
    train, report = read_pairs(data.train, limit=data.max_pairs, **options)
    if data.valid is None:
        return *split_by_prompt(train, data.valid_fraction, config.text_seed), report
    valid, valid_report = read_pairs(data.valid, **options)
    train, report = without_held_out(train, report, _as_prompts(valid), "data.train")
    report.dropped += valid_report.dropped
    report.counts += valid_report.counts
    return train, valid, report


def prompts_of(config: Config, tokenizer: Any = None) -> tuple[list[Prompt], ReadReport]:
    """Prompts for PPO and for sampled pairs, each once, less those held out."""
    data, options = config.data, _options(config, tokenizer)
    if data.train == TOY:
        rows = toy.prompts(data.toy, data.num_prompts, config.text_seed, "train")
        return rows, ReadReport(kept=len(rows))
    if data.prompts is not None or data.valid is not None:
        rows, report = read_prompts(data.prompts or data.train, unique=True, **options)
        return without_held_out(rows, report, held_out_of(config, tokenizer), "data.prompts" if data.prompts else "data.train")
    if config.pairs.source == "data":
        rows, report = _as_prompts(pairs_of(config, tokenizer)[0]), ReadReport()
    else:
        rows, report = read_prompts(data.train, unique=True, **options)
        rows = split_by_prompt(rows, data.valid_fraction, config.text_seed)[0]
    report.kept = len(rows)
    return rows, report


def evaluation_prompts_of(config: Config, tokenizer: Any = None) -> list[Prompt]:
    """Held-out prompts, each once, with a reference response where there is one; as many as `evaluation.num_prompts`."""
    n = config.evaluation.num_prompts
    if config.data.train == TOY:
        return toy.prompts(config.data.toy, n, config.text_seed, "evaluation")
    return held_out_of(config, tokenizer)[:n]


def valid_prompts_of(config: Config, tokenizer: Any = None) -> list[Prompt]:
    """Held-out prompts for sampled pairs, at most `pairs.num_valid`; from files they are among those of the evaluation."""
    n = config.pairs.num_valid
    if config.data.train == TOY:
        return toy.prompts(config.data.toy, n, config.text_seed, "valid")
    return held_out_of(config, tokenizer)[:n]


def held_out_of(config: Config, tokenizer: Any = None) -> list[Prompt]:
    """The prompts of the valid rows: no training of any kind sees them."""
    data, options = config.data, _options(config, tokenizer)
    if config.pairs.source == "data":
        return _as_prompts(pairs_of(config, tokenizer)[1])
    rows, _ = read_prompts(data.train if data.valid is None else data.valid, unique=True, **options)
    return rows if data.valid is not None else split_by_prompt(rows, data.valid_fraction, config.text_seed)[1]


def _as_prompts(pairs: list[Pair]) -> list[Prompt]:
    """Prompts of pairs, each once, the chosen response as reference."""
    first = {pair.prompt: pair for pair in reversed(pairs)}
    return [Prompt(p.id, p.prompt, p.source, p.chosen, p.templated) for p in pairs if first[p.prompt] is p]
