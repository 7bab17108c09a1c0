"""What a run reads: its rows, the gold reward, their identity by content, and checks of all that before anything is built."""

from dataclasses import asdict
from typing import Any, Literal, TypeVar

from jaxrlhf.algorithms.rounds import SECTIONS_READ, method_of
from jaxrlhf.config import Config
from jaxrlhf.data import toy
from jaxrlhf.data.pairs import Demonstration, Pair, Prompt, ReadReport, read_demonstrations, read_pairs, read_prompts, split_by_prompt
from jaxrlhf.data.read_report import DataError
from jaxrlhf.data.sources import source_identity
from jaxrlhf.data.tokens import Limits
from jaxrlhf.models import DecoderConfig
from jaxrlhf.models.hub import check_vocabulary, check_weights, read_config, resolve
from jaxrlhf.models.hub.identity import folder_identity
from jaxrlhf.plugins import plugin, source_of
from jaxrlhf.scorers import Scorer
from jaxrlhf.scorers.function import function_scorer
from jaxrlhf.scorers.reward_model import limits_within, reward_model_scorer
from jaxrlhf.scorers.toy import toy_gold

TOY = "toy"
OF_MEMORY = ("remat", "logits_chunk", "offload_frozen")  # of config.model, but nothing that a result depends on
T = TypeVar("T", Pair, Demonstration, Prompt)


def check(config: Config, tokenizer: Any = None, *, columns: tuple[str, ...] = ()) -> None:
    """Raise before anything is built where a model, gold or data cannot be found, do not fit together, or data have no usable row.

    Hub ids are fetched here and not hours later; data are read to the first usable row of each source, pairs to their end where the reward
    loss reads a column `margin` (`columns`).
    """
    data, options = config.data, _options(config, tokenizer)
    if config.model.source is not None:
        check_model(config, check_weights(config.model.source, head="lm"), tokenizer)
    if config.gold.kind == "model":
        check_positions(config, check_weights(config.gold.source or "", head="scalar"), config.gold.source)
    gold = function_scorer(config.gold.source or "") if config.gold.kind == "function" else None
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
    """ValueError where the base model has no embedding for an id of the tokenizer, or has not learned the positions of the longest text."""
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.vocab_size)
    check_positions(config, model, config.model.source)


def check_positions(config: Config, model: DecoderConfig, source: str | None) -> None:
    """ValueError where a model has not learned as many positions, in a table or by rotation, as the longest text of the run has."""
    update = method_of(config.method, config.row, plugin).reward_update
    filters = update is not None and "filter" in SECTIONS_READ.get(update, ("filter",))  # code that is not ours may read all
    prompt, response = config.data.limits.max_prompt_length, longest_response(config, filters=filters)
    if prompt + response > model.longest_text:
        raise ValueError(
            f"prompts of {prompt} and responses of {response} tokens are {prompt + response} positions, and {source} has learned "
            f"{model.longest_text}; lower data.limits.max_prompt_length, data.limits.max_response_length"
            f"{', ppo.response_length or filter.max_new_tokens' if filters else ' or ppo.response_length'}."
        )


def longest_response(config: Config, *, filters: bool = True) -> int:
    """Tokens of the longest response that is read or written, by a filter too: arms share π_SFT and its positions, with one or without."""
    return max(config.data.limits.max_response_length, config.ppo.response_length, (filters and config.filter.max_new_tokens) or 0)


def try_gold(gold: Scorer | None, rows: list[Prompt]) -> None:
    """Call a gold function once, on the references of a few prompts: what is wrong with its answer is said before anything is built."""
    if gold is not None:
        gold([row.prompt for row in rows], [row.reference or "" for row in rows])


def gold_of(config: Config, mesh: Any = None) -> Scorer | None:
    """The true reward, or None where the config names none."""
    gold = config.gold
    if gold.kind == "toy":
        return toy_gold(config.data.toy)
    if gold.kind == "function":
        return function_scorer(gold.source or "")
    if gold.kind == "model":
        limits = gold_limits(config, read_config(resolve(gold.source or "")))
        how: dict[str, Any] = {"batch_size": gold.batch_size, "dtype": gold.dtype, "template_date": config.data.template_date}
        return reward_model_scorer(gold.source or "", limits=limits, mesh=mesh, **how)
    return None


def gold_limits(config: Config, model: DecoderConfig) -> Limits:
    """Twice the run's, because gold's tokenizer may need more tokens for a text; less where gold has not learned so many positions."""
    return limits_within(model, config.data.limits.max_prompt_length, longest_response(config), times=2)


def limits_of(config: Config) -> Limits:
    limits = config.data.limits
    return Limits(limits.max_prompt_length, limits.max_response_length, limits.long_prompt, limits.long_response)


def _options(config: Config, tokenizer: Any) -> dict[str, Any]:
    """How rows are read: the same for every source."""
    data = config.data
    read = {"on_bad_row": data.on_bad_row, "prompt_format": data.prompt_format, "response_format": data.response_format}
    read |= {"template_date": data.template_date, "implicit_prompt": data.implicit_prompt}
    return {"tokenizer": tokenizer, "rename": data.rename, **read}


def demonstrations_of(config: Config, tokenizer: Any = None) -> tuple[list[Demonstration], ReadReport]:
    """Text for SFT: its own file, else the chosen responses of the training pairs; less the prompts held out."""
    data = config.data
    if data.train == TOY:
        rows = toy.demonstrations(data.toy, data.num_demonstrations, config.text_seed)
        return rows, ReadReport(kept=len(rows))
    rows, report = read_demonstrations(data.demonstrations or data.train, **_options(config, tokenizer))
    held_out = held_out_of(config, tokenizer)
    if data.demonstrations is not None or data.valid is not None:
        return without_held_out(rows, report, held_out, "data.demonstrations" if data.demonstrations else "data.train")
    held = {row.prompt for row in held_out}
    rows = [row for row in rows if row.prompt not in held]
    report.kept = len(some_left(rows, "data.train"))
    return rows, report


def held_out_demonstrations_of(config: Config, tokenizer: Any = None) -> list[Demonstration]:
    """Demonstrations that SFT does not see: those of `data.valid`, else those to held-out prompts; of the toy task `pairs.num_valid`.
    DataError where there are none."""
    data = config.data
    if data.train == TOY:
        return toy.demonstrations(data.toy, config.pairs.num_valid, config.text_seed, "valid")
    rows, _ = read_demonstrations(data.valid or data.demonstrations or data.train, **_options(config, tokenizer))
    held = None if data.valid is not None else {row.prompt for row in held_out_of(config, tokenizer)}
    if found := [row for row in rows if held is None or row.prompt in held]:
        return found
    raise DataError("sft.eval_steps asks for looks at held-out rows, and there are none: name data.valid, or leave it out.")


def without_held_out(rows: list[T], report: ReadReport, held_out: list[Prompt], name: str) -> tuple[list[T], ReadReport]:
    """(rows, report) less those rows of another file whose prompt is held out; each is named in the report.

    An empty prompt is no prompt that two files could share. Raises DataError where no row is left.
    """
    held = {row.prompt for row in held_out} - {""}
    kept = [row for row in rows if row.prompt not in held]
    report.dropped += [(row.source, "held out: its prompt is among the held-out rows") for row in rows if row.prompt in held]
    report.kept = len(some_left(kept, name))
    return kept, report


def some_left(rows: list[T], name: str) -> list[T]:
    """The rows that holding out has left of `name`. DataError where it has left none."""
    if not rows:
        raise DataError(
            f"every row of {name} has a prompt that is also held out, so there is nothing to train on; give other held-out rows."
        )
    return rows


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
    return _aside(config, tokenizer, config.evaluation.num_prompts, "evaluation")


def valid_prompts_of(config: Config, tokenizer: Any = None) -> list[Prompt]:
    """Held-out prompts for sampled pairs, at most `pairs.num_valid`; from files they are among those of the evaluation."""
    return _aside(config, tokenizer, config.pairs.num_valid, "valid")


def _aside(config: Config, tokenizer: Any, n: int, split: Literal["evaluation", "valid"]) -> list[Prompt]:
    data = config.data
    return toy.prompts(data.toy, n, config.text_seed, split) if data.train == TOY else held_out_of(config, tokenizer)[:n]


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


def data_identity(config: Config) -> dict[str, Any]:
    """What the text of a run depends on, contents of files included: equal identities, equal rows."""
    data = config.data
    section = asdict(data)
    if data.train == TOY:
        counts = {"num_demonstrations": data.num_demonstrations, "num_prompts": data.num_prompts}
        return {"toy": section["toy"], **counts, "seed": config.text_seed}
    for name in ("train", "valid", "demonstrations", "prompts"):
        sources = (section[name],) if isinstance(section[name], str) else section[name] or ()
        section[name] = [source_identity(source) for source in sources]
    del section["toy"], section["num_demonstrations"], section["num_prompts"], section["limits"]
    return section | {"pairs": config.pairs.source, "seed": config.text_seed}


def model_identity(config: Config) -> dict[str, Any]:
    """What the base model is: the content of its folder, or a shape; and the dtype it computes in."""
    section = {name: value for name, value in asdict(config.model).items() if name not in OF_MEMORY}
    return section | {"source": None if config.model.source is None else folder_identity(config.model.source)}


def tokenizer_identity(source: str | None) -> str | None:
    """The content of the folder that a tokenizer is read from, None where none is named."""
    return None if source is None else folder_identity(source, weights=False)


def gold_identity(config: Config) -> dict[str, Any]:
    """What gold's scores depend on: a function and its code, or the content of a folder."""
    gold = config.gold
    section, content = asdict(gold), None
    if gold.source and gold.kind == "function":
        content = source_of(gold.source)
    elif gold.source and gold.kind == "model":
        section |= {"source": None, "template_date": config.data.template_date}
        content = folder_identity(gold.source)
    return section | {"content": content}
