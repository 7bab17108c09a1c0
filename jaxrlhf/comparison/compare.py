"""Two sides on the same prompts by a gold scorer, a judge or both: what `jaxrlhf evaluate` does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jaxrlhf.comparison.candidates import REFERENCE, Candidate, check_model, facts, read_candidate
from jaxrlhf.comparison.figures import FIGURES, Comparison, Texts, compare, gold_scores
from jaxrlhf.comparison.judge import Judged, judge_pairs
from jaxrlhf.comparison.judge_client import Judge
from jaxrlhf.comparison.prompts import Prompts, prompts_identity, prompts_of
from jaxrlhf.comparison.responses import GenerationSettings, candidate_identity, matched, new_tokens_of, responses_of
from jaxrlhf.comparison.tables import judge_line, main_table, reference_table, write_comparison
from jaxrlhf.config import DataConfig
from jaxrlhf.files import read_json, write_whole
from jaxrlhf.models.hub import read_config, resolve
from jaxrlhf.models.hub.identity import folder_identity
from jaxrlhf.monitoring.progress import shown
from jaxrlhf.pipeline.inputs import try_gold
from jaxrlhf.plugins import source_of
from jaxrlhf.scorers import Scorer
from jaxrlhf.scorers.function import function_scorer
from jaxrlhf.scorers.reward_model import limits_within, reward_model_scorer
from jaxrlhf.scorers.toy import toy_gold

ANSWERS = "answers.jsonl"
SETTINGS = "settings.json"


def evaluate(
    a: str,
    b: str = REFERENCE,
    *,
    output: str | Path,
    gold: str | None = None,
    judge: Judge | None = None,
    prompts: str | None = None,
    toy_prompts: int | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    max_prompt_length: int = GenerationSettings.max_prompt_length,
    temperature: float = GenerationSettings.temperature,
    batch_size: int = GenerationSettings.batch_size,
    dtype: str | None = None,
    seed: int = 0,
    length: str = "characters",
    bins: int = 5,
    tokenizer: str | None = None,
    implicit_prompt: str = DataConfig.implicit_prompt,
    template_date: str = DataConfig.template_date,
    overwrite: bool = False,
    show: Callable[[str], Any] = shown,
) -> Comparison:
    """Compare a with b into the folder `output`: comparison.json, comparison.md, comparison.jsonl.

    a, b: a policy folder or hub id, a file or evaluation stage of stored responses, or "reference". gold: "toy", a reward model's folder or
    `module:attribute`. Prompts come from the file `prompts` (or an evaluation stage), from the toy task (`toy_prompts`: so many, of its
    evaluation split), or else from the stored responses of a or b. `seed` is of the toy prompts and of the sampling.
    What policies wrote and what the judge said is kept in `output` as it comes, and is not asked for again by the same call.

    Raises ValueError, FileNotFoundError or DataError where a side, the prompts or gold cannot be used, FileExistsError where `output` holds
    a comparison with other settings (and not `overwrite`) or anything else, and what the judge raises.
    """
    if gold is None and judge is None:
        raise ValueError("nobody judges: give --gold (toy, a reward model's folder or module:attribute), --judge MODEL, or both.")
    if a == b:
        raise ValueError(f"both sides are {a}; name two different ones.")
    sides = read_candidate(a), read_candidate(b)
    asked = prompts_of(sides, prompts, toy_prompts, limit, seed, tokenizer, implicit_prompt=implicit_prompt, template_date=template_date)
    new_tokens, notes = new_tokens_of(sides, max_new_tokens)
    writing = GenerationSettings(new_tokens, max_prompt_length, temperature, batch_size, seed, dtype, template_date)
    scorer = None if gold is None else gold_scorer(gold, writing, longest(sides, asked, writing))
    try_gold(scorer, asked.rows[:2])
    settings = settings_of(sides, asked, writing, gold, judge, {"length": length, "bins": bins})
    folder = Path(output)
    check_output(folder, settings, overwrite)
    write_whole(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
    responses = [responses_of(side, name, asked, writing, folder, show) for side, name in zip(sides, "ab", strict=True)]
    texts, finished, left_out = matched(asked.rows, responses)
    notes = [note for side in sides for note in side.notes] + notes + left_out
    scores = None if scorer is None else gold_scores(texts, scorer)  # before the judge: what is wrong here is said before anything is paid
    judged = None if judge is None else _judged(texts, judge, folder, show)
    names = sides[0].name, sides[1].name
    done = compare(texts, names, gold=scores, judged=judged, measure=length, bins=bins)
    for name, side, ends in zip("ab", sides, finished, strict=True):
        done.figures[name] |= facts(side) | {"finished": None if None in ends or not ends else sum(map(bool, ends)) / len(ends)}
    done.figures.update(notes=notes, settings=settings)
    write_comparison(done, folder)
    return done


def longest(sides: tuple[Candidate, Candidate], asked: Prompts, writing: GenerationSettings) -> tuple[int, int]:
    """Tokens that no prompt and no response exceeds, whatever the tokenizer: bytes of what is known, twice the tokens of what is not."""
    stored = [row.response for side in sides for row in side.rows] + [row.reference or "" for row in asked.rows]
    responses = [len(text.encode()) for text in stored] + [2 * writing.max_new_tokens]
    return max(len(row.prompt.encode()) for row in asked.rows) + 64, max(responses) + 1  # room for a chat template, and for EOS


def gold_scorer(gold: str, writing: GenerationSettings, limits: tuple[int, int]) -> Scorer:
    """The scorer that --gold names; `limits` are tokens of prompts and responses. Learned positions set a bound."""
    if gold == "toy":
        return toy_gold()
    path = Path(gold).expanduser()
    if ":" in gold and not path.exists():
        return function_scorer(gold)
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(str(p) for p in (path / "stages").glob("*-reward*")) if (path / "stages").is_dir() else []
            beside = f"; its reward models are {', '.join(found)}" if found else ""
            raise ValueError(f"--gold {gold} is no reward model's folder: it has no config.json{beside}.")
        check_model(path, gold, head="scalar")
    folder = resolve(gold)
    within = limits_within(read_config(folder), *limits)
    how: dict[str, Any] = {"batch_size": writing.batch_size, "dtype": writing.dtype or "float32", "template_date": writing.template_date}
    return reward_model_scorer(str(folder), limits=within, **how)


def settings_of(
    sides: tuple[Candidate, Candidate],
    asked: Prompts,
    writing: GenerationSettings,
    gold: str | None,
    judge: Judge | None,
    rest: dict[str, Any],
) -> dict[str, Any]:
    """What the comparison depends on. A side is its content, wherever it lies."""
    return {
        **{name: candidate_identity(side) for name, side in zip("ab", sides, strict=True)},
        "prompts": prompts_identity(asked.rows),
        "gold": _gold_identity(gold),
        "judge": None if judge is None else judge.identity(),
        **writing.identity(),
        **rest,
    }


def _gold_identity(gold: str | None) -> Any:
    """A folder by its content, a function by its name and code."""
    if gold is None or gold == "toy":
        return gold
    if ":" in gold and not Path(gold).expanduser().exists():
        return [gold, source_of(gold)]
    return folder_identity(gold)


def check_output(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Only this comparison, finished or not, may be continued in a folder that holds something."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        found = read_json(folder / SETTINGS, "")
    except (OSError, ValueError):
        found = {}
    if not {"a", "b", "prompts"} <= found.keys():  # other programs have a settings.json too
        raise FileExistsError(f"{folder} exists and holds no comparison; give another --output.")
    changed = sorted(name for name in settings if found.get(name) != settings[name])
    if changed and not overwrite:
        raise FileExistsError(f"{folder} holds a comparison with another {', '.join(changed)}; give another --output, or --overwrite.")
    if changed:
        (folder / FIGURES).unlink(missing_ok=True)  # of the earlier settings: until the new one is there, none is


def _judged(texts: Texts, judge: Judge, folder: Path, show: Callable[[str], Any]) -> Judged:
    with show(f"questions to {judge.model}") as progress:
        return judge_pairs(texts.prompts, texts.a, texts.b, judge, folder / ANSWERS, progress=progress)


def show(figures: dict[str, Any], console: Console | None = None) -> None:
    """Print the tables of comparison.md but the breakdown by length."""
    console = console or Console()
    tables = [main_table(figures)]
    if against := reference_table(figures):
        tables.append((("by gold, against the references", "wins (strictly)", "ties", "score"), against))
    for side in "ab":
        console.print(f"{side.upper()}: {figures[side]['name']}", markup=False, highlight=False)
    for head, rows in tables:
        table = Table(box=box.SIMPLE_HEAD)
        for n, name in enumerate(head):
            table.add_column(name, justify="right" if n else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    lines = [*figures["notes"], *([judge_line(figures["judge"]["usage"])] if figures["judge"] else [])]
    for line in lines:
        console.print(line, markup=False, highlight=False)
