"""A language model as judge of two responses, behind any endpoint that speaks OpenAI's chat completions.

Every pair is asked about twice, the second time in the other order, and a verdict that follows the order is a tie: a judge that always
prefers the first answer gives a score of exactly one half. Answers are stored as they come (`judge_answers.py`) under a hash of all that
was asked, so that an evaluation that was stopped goes on where it was, and one that is finished can be read question by question.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxrlhf.comparison.judge_answers import AnswerFile
from jaxrlhf.comparison.judge_client import REFUSED, Judge, JudgeClient, Question
from jaxrlhf.comparison.judge_replies import FIRST, SECOND, TIE

T = TypeVar("T")


class Verdict(NamedTuple):
    """What the judge says of one pair (a, b): `outcome` 1, ½ or 0 for a, None where an order has no verdict; `orders` are the verdicts with
    a first and with b first; `keys` are those of the two answers, None for identical responses, which tie unasked."""

    outcome: float | None
    orders: tuple[str | None, str | None]
    keys: tuple[str, str] | None


class Judged(NamedTuple):
    """One verdict a pair, in the order of the pairs, and the account of what they took (see `usage_of`)."""

    verdicts: list[Verdict]
    usage: dict[str, Any]


def combine(forward: str | None, backward: str | None) -> float | None:
    """a's outcome, out of the verdicts with a first (`forward`) and with b first: 1 or 0 where both name the same response, ½ where they
    disagree or either says tie, None where an order has no verdict."""
    if forward is None or backward is None:
        return None
    if (forward, backward) == (FIRST, SECOND):
        return 1.0
    return 0.0 if (forward, backward) == (SECOND, FIRST) else 0.5


def judge_pairs(
    prompts: Sequence[str],
    a: Sequence[str],
    b: Sequence[str],
    judge: Judge,
    answers: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """The judge's verdict on every pair of responses; what the file `answers` holds already is not asked again.

    A request that the endpoint refuses (400, 413, 422: a text too long, a filter) or does not answer in `judge.attempts` has no verdict now
    and is asked again the next time; one whose answers are all nonsense has none for good. Both leave the pair out of n, and are counted.
    Raises JudgeError without the client library or the key, where the endpoint knows neither key nor model, where nothing but refusals
    or silence comes back, and AnswerError for a damaged file.
    """
    if not len(prompts) == len(a) == len(b):
        raise ValueError(f"{len(prompts)} prompts, {len(a)} and {len(b)} responses; give one of each a row.")
    pairs = [(Question(p, x, y), Question(p, y, x)) for p, x, y in zip(prompts, a, b, strict=True)]
    wanted = {judge.key(*q): q for one, other in pairs if one.first != one.second for q in (one, other)}
    with AnswerFile(Path(answers)) as stored:
        missing = {key: question for key, question in wanted.items() if key not in stored.found}
        failed: dict[str, str] = {}
        asked_now = len(missing)
        if missing:
            failed = _run(JudgeClient(judge, stored, progress).all(missing))
        found = {key: stored.found[key] for key in wanted if key in stored.found}
        in_vain = [line for line in stored.failed if line["key"] in wanted]
    verdicts = [_verdict(judge, *pair, found) for pair in pairs]
    return Judged(verdicts, usage_of(verdicts, found, failed, judge, in_vain) | {"asked_now": asked_now})


def _verdict(judge: Judge, one: Question, other: Question, found: dict[str, dict[str, Any]]) -> Verdict:
    if one.first == one.second:
        return Verdict(0.5, (TIE, TIE), None)
    keys = judge.key(*one), judge.key(*other)
    orders = tuple(found[key]["verdict"] if key in found else None for key in keys)
    return Verdict(combine(*orders), orders, keys)  # type: ignore[arg-type]


def usage_of(
    verdicts: Sequence[Verdict],
    found: dict[str, dict[str, Any]],
    failed: dict[str, str],
    judge: Judge,
    in_vain: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """What the verdicts are made of, and what they cost.

    pairs = judged + no_verdict. `first_rate`: the share of decided questions whose first response won; ½ is a judge without a preference
    for places. `consistency`: the share of the asked and judged pairs on which both orders agree. Tokens are what the endpoint reported,
    over all that was asked for the stored answers and for questions that failed (`in_vain`, a line for every time one did), in this process
    or before; `cost` is None without prices or where an answer came without a count. `refused` and `unanswered`: questions without a stored
    answer, by why.
    """
    asked = [v for v in verdicts if v.keys is not None]
    judged = [v for v in asked if v.outcome is not None]
    decided = [order for v in judged for order in v.orders if order in (FIRST, SECOND)]
    agree = [v for v in judged if v.outcome != 0.5 or v.orders == (TIE, TIE)]
    rows = found.values()
    paid = [*rows, *in_vain]
    counts = {name: sum(row[name] or 0 for row in paid) for name in ("prompt_tokens", "completion_tokens", "requests")}
    uncounted = sum(row["prompt_tokens"] is None for row in paid)
    priced = judge.price_in is not None and judge.price_out is not None and not uncounted
    cost = (counts["prompt_tokens"] * judge.price_in + counts["completion_tokens"] * judge.price_out) / 1e6 if priced else None  # type: ignore[operator]
    return {
        "pairs": len(verdicts),
        "judged": sum(v.outcome is not None for v in verdicts),
        "no_verdict": sum(v.outcome is None for v in verdicts),
        "identical": len(verdicts) - len(asked),
        "first_rate": sum(order == FIRST for order in decided) / len(decided) if decided else None,
        "consistency": len(agree) / len(judged) if judged else None,
        "answers": len(found),
        "nonsense": sum(row["verdict"] is None for row in rows),
        "refused": sum(why.startswith(REFUSED) for why in failed.values()),
        "unanswered": sum(not why.startswith(REFUSED) for why in failed.values()),
        "failures": sorted(set(failed.values()))[:5],
        **counts,
        "answers_without_token_count": uncounted,
        "cost": cost,
    }


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """asyncio.run; in a thread of its own where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
