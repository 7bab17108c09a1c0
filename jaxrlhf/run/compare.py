"""Two sides on the same prompts by a gold scorer, a judge or both: what `jaxrlhf evaluate` does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jaxrlhf.data.tokens import Limits
from jaxrlhf.evaluation.comparison import (
    FIGURES,
    MEASURES,
    TABLE,
    Comparison,
    Texts,
    compare,
    gold_scores,
    judge_line,
    main_table,
    reference_table,
    write_comparison,
)
from jaxrlhf.evaluation.judge import TEMPLATE, Judge, Judged, judge_pairs
from jaxrlhf.models.hub import read_config, resolve
from jaxrlhf.plugins import source_of
from jaxrlhf.run.embed import shown
from jaxrlhf.run.inputs import folder_identity, try_gold
from jaxrlhf.run.responses import Asked, Writing, asked_of, identity, new_tokens_of, prompts_identity, responses_of, together, write
from jaxrlhf.run.sides import REFERENCE, Side, check_model, facts, side_of
from jaxrlhf.scorers import Scorer
from jaxrlhf.scorers.function import function_scorer
from jaxrlhf.scorers.reward_model import reward_model_scorer
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
    max_prompt_length: int = Writing.max_prompt_length,
    temperature: float = Writing.temperature,
    batch_size: int = Writing.batch_size,
    dtype: str | None = None,
    seed: int = 0,
    length: str = "characters",
    bins: int = 5,
    tokenizer: str | None = None,
    overwrite: bool = False,
    show: Callable[[str], Any] = shown,
) -> Comparison:
    """Compare a with b into the folder `output`: comparison.json, comparison.md, comparison.jsonl.

    a, b: a policy folder or hub id, a file or evaluation stage of stored responses, or "reference". gold: "toy", a reward model's folder or
    `module:attribute`. Prompts come from the file `prompts` (or an evaluation stage), from the toy task (`toy_prompts`: so many, of its
    evaluation split), or else from the stored responses of a or b. `seed` is of the toy prompts, of the sampling and of the bootstrap.
    What policies wrote and what the judge said is kept in `output` as it comes, and is not asked for again by the same call.

    Raises ValueError, FileNotFoundError or DataError where a side, the prompts or gold cannot be used, FileExistsError where `output` holds
    a comparison with other settings (and not `overwrite`) or anything else, and what the judge raises.
    """
    if gold is None and judge is None:
        raise ValueError("nobody judges: give --gold (toy, a reward model's folder or module:attribute), --judge MODEL, or both.")
    if a == b:
        raise ValueError(f"both sides are {a}; name two different ones.")
    sides = side_of(a), side_of(b)
    asked = asked_of(sides, prompts, toy_prompts, limit, seed, tokenizer)
    new_tokens, notes = new_tokens_of(sides, max_new_tokens)
    writing = Writing(new_tokens, max_prompt_length, temperature, batch_size, seed, dtype)
    scorer = None if gold is None else gold_scorer(gold, writing, longest(sides, asked, writing))
    try_gold(scorer, asked.rows[:2])
    settings = settings_of(sides, asked, writing, gold, judge, {"length": length, "bins": bins})
    folder = Path(output)
    check_output(folder, settings, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
    told = [responses_of(side, name, asked, writing, folder, show) for side, name in zip(sides, "ab", strict=True)]
    texts, finished, left_out = together(asked.rows, told)
    notes = [note for side in sides for note in side.notes] + notes + left_out
    scores = None if scorer is None else gold_scores(texts, scorer)  # before the judge: what is wrong here is said before anything is paid
    judged = None if judge is None else _judged(texts, judge, folder, show)
    names = sides[0].name, sides[1].name
    done = compare(texts, names, gold=scores, judged=judged, measure=length, bins=bins, seed=seed)
    for name, side, ends in zip("ab", sides, finished, strict=True):
        done.figures[name] |= facts(side) | {"finished": None if None in ends or not ends else sum(map(bool, ends)) / len(ends)}
    done.figures.update(notes=notes, settings=settings)
    write_comparison(done, folder)
    return done


def longest(sides: tuple[Side, Side], asked: Asked, writing: Writing) -> tuple[int, int]:
    """Tokens that no prompt and no response exceeds, whatever the tokenizer: bytes of what is known, twice the tokens of what is not."""
    stored = [row.response for side in sides for row in side.rows] + [row.reference or "" for row in asked.rows]
    responses = [len(text.encode()) for text in stored] + [2 * writing.max_new_tokens]
    return max(len(row.prompt.encode()) for row in asked.rows) + 64, max(responses) + 1  # room for a chat template, and for EOS


def gold_scorer(gold: str, writing: Writing, limits: tuple[int, int]) -> Scorer:
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
    model = read_config(folder)
    prompt, response = limits
    if model.positions == "learned":
        response = min(response, model.max_positions // 2)
        prompt = min(prompt, model.max_positions - response)
    within = Limits(prompt, response, "truncate", "truncate")
    return reward_model_scorer(str(folder), batch_size=writing.batch_size, limits=within, dtype=writing.dtype or "float32")


def settings_of(
    sides: tuple[Side, Side], asked: Asked, writing: Writing, gold: str | None, judge: Judge | None, rest: dict[str, Any]
) -> dict[str, Any]:
    """What the comparison depends on. A side is its content, wherever it lies."""
    return {
        **{name: identity(side) for name, side in zip("ab", sides, strict=True)},
        "prompts": prompts_identity(asked.rows),
        "gold": _gold_identity(gold),
        "judge": None if judge is None else judge.described(),
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
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not settings.keys() <= found.keys():  # other programs have a settings.json too
        raise FileExistsError(f"{folder} exists and holds no comparison; give another --output.")
    changed = sorted(name for name in settings if found.get(name) != settings[name])
    if changed and not overwrite:
        raise FileExistsError(f"{folder} holds a comparison with another {', '.join(changed)}; give another --output, or --overwrite.")
    if changed:
        (folder / FIGURES).unlink(missing_ok=True)  # of the earlier settings: until the new one is there, none is


def _judged(texts: Texts, judge: Judge, folder: Path, show: Callable[[str], Any]) -> Judged:
    with show(f"questions to {judge.model}") as progress:
        return judge_pairs(texts.prompts, texts.a, texts.b, judge, folder / ANSWERS, progress=progress)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `jaxrlhf evaluate`."""
    parser.description = (
        "Compare two policies, or a policy with reference or stored responses, on the same prompts: win rates by gold, a judge or both."
    )
    side = "a policy folder or hub id; a file or evaluation stage of stored responses; or the word reference"
    parser.add_argument("a", help=side)
    parser.add_argument("b", nargs="?", default=REFERENCE, help=f"{side} (default)")
    parser.add_argument("--output", help="folder for the comparison (default: comparisons/A-against-B)")
    parser.add_argument("--overwrite", action="store_true", help="replace a comparison that was made with other settings")
    group = parser.add_argument_group("prompts", "default: those of the stored responses")
    group.add_argument("--prompts", help="JSONL(.gz) or Parquet with a prompt field, or an evaluation stage of a run")
    group.add_argument("--toy", type=int, metavar="N", help="N evaluation prompts of the built-in task")
    group.add_argument("--limit", type=int, help="the first so many prompts")
    group.add_argument("--tokenizer", help="a folder whose chat template renders conversations (default: that of the first policy)")
    group = parser.add_argument_group("policies")
    group.add_argument("--max_new_tokens", type=int, help="for both sides (default: what their stages say, else 128)")
    group.add_argument("--max_prompt_length", type=int, default=Writing.max_prompt_length)
    group.add_argument("--temperature", type=float, default=Writing.temperature, help="0 is greedy")
    group.add_argument("--batch_size", type=int, default=Writing.batch_size)
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="of policies and gold (default: the policies' own, gold float32)")
    group.add_argument("--seed", type=int, default=0, help="of toy prompts, of sampling and of the bootstrap")
    group = parser.add_argument_group("figures")
    group.add_argument("--gold", help="toy, a reward model's folder, or module:attribute")
    group.add_argument("--length", choices=tuple(MEASURES), default="characters", help="what the length of a response counts")
    group.add_argument("--bins", type=int, default=5, help="of the breakdown by length")
    add_judge_arguments(parser)


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("judge", "any endpoint of OpenAI's chat completions; the key comes from the environment only")
    group.add_argument("--judge", metavar="MODEL", help="the judge's name at its endpoint")
    group.add_argument("--judge_base_url", help="its address, such as http://localhost:8000/v1 (default: OpenAI's)")
    group.add_argument("--api_key_env", default=Judge.api_key_env, help="the variable that holds the key (default: %(default)s)")
    group.add_argument("--judge_template", help="the question: a file, or text with {prompt}, {first} and {second}")
    group.add_argument("--judge_request", default="{}", metavar="JSON", help="fields of a request to add, or with null to leave out")
    group.add_argument("--judge_concurrency", type=int, default=Judge.concurrency, help="requests at a time")
    group.add_argument("--judge_timeout", type=float, default=Judge.timeout, help="seconds a request may take")
    group.add_argument("--judge_attempts", type=int, default=Judge.attempts, help="of one request, while the endpoint is busy or broken")
    group.add_argument("--judge_asks", type=int, default=Judge.asks, help="of one question, while the answer is none of A, B and tie")
    group.add_argument("--judge_keep_going", action="store_true", help="past questions that get no answer, however many")
    group.add_argument("--judge_price_in", type=float, help="of a million tokens; with --judge_price_out: the cost is told")
    group.add_argument("--judge_price_out", type=float)


def judge_of(options: argparse.Namespace) -> Judge | None:
    """The judge that the command line names. Raises ValueError for a request that is no JSON object."""
    if options.judge is None:
        return None
    try:
        request = json.loads(options.judge_request)
    except ValueError as error:
        raise ValueError(f"--judge_request is not JSON ({error}); write it as '{{\"max_tokens\": 64}}'.") from error
    if not isinstance(request, dict):
        raise ValueError("--judge_request must be a JSON object, such as '{\"max_tokens\": 64}'.")
    given = options.judge_template
    template = TEMPLATE if given is None else given
    if given is not None and "{prompt}" not in given:
        template = Path(given).expanduser().read_text(encoding="utf-8")
    return Judge(
        model=options.judge,
        base_url=options.judge_base_url,
        api_key_env=options.api_key_env,
        template=template,
        request=request,
        concurrency=options.judge_concurrency,
        timeout=options.judge_timeout,
        attempts=options.judge_attempts,
        asks=options.judge_asks,
        keep_going=options.judge_keep_going,
        price_in=options.judge_price_in,
        price_out=options.judge_price_out,
    )


def default_output(a: str, b: str) -> Path:
    """comparisons/A-against-B, by the last two parts of either name: a run and its stage."""
    names = ["-".join(part for part in Path(side).parts[-3:] if part not in ("stages", "/", ".", "..")) for side in (a, b)]
    return Path("comparisons") / "-against-".join(names)


def main(options: argparse.Namespace) -> int:
    """Compare as the command line says, show progress, and print the tables and where they lie."""
    folder = Path(options.output) if options.output else default_output(options.a, options.b)
    done = evaluate(
        options.a,
        options.b,
        output=folder,
        judge=judge_of(options),
        toy_prompts=options.toy,
        **{
            name: getattr(options, name)
            for name in ("gold", "prompts", "limit", "max_new_tokens", "max_prompt_length", "temperature", "batch_size", "dtype", "seed")
        },
        **{name: getattr(options, name) for name in ("length", "bins", "tokenizer", "overwrite")},
    )
    show(done.figures)
    print(f"comparison: {folder / TABLE}")
    return 0


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
