"""The samples a page lets its reader browse: rows of plain JSON from the evaluations' samples.parquet."""

from collections.abc import Sequence
from typing import Any

from jaxrlhf.report.arms import Arm
from jaxrlhf.report.run_files import number, sample_columns

COLUMNS = ("arm", "round", "prompt", "response", "reference", "gold", "proxy", "kl", "length", "ended")
CAP = 200  # rows of one arm and round
TOTAL = 6000  # rows of a page: more would make it slow to open
NONE_YET = "None yet: they come with the first evaluation, which follows SFT, in stages/."
TEXT_LIMIT = 4000  # characters of one text


def samples_of(arms: Sequence[Arm], cap: int = CAP) -> tuple[dict[str, Any], str]:
    """({"columns", "arms", "rows"}, what is shown of how much), of the first seed of every arm."""
    evaluations = [(n, stage) for n, arm in enumerate(arms) for stage in arm.first.run.of("evaluation")]
    each = min(cap, max(1, TOTAL // max(len(evaluations), 1)))
    rows: list[list[Any]] = []
    for place, stage in evaluations:
        columns = sample_columns(stage.folder, arms[place].first.run.missing)
        rows += [_row(place, stage.round or 0, columns, i) for i in range(min(each, len(columns.get("response_1") or [])))]
    if not rows:
        said = "None, as --samples 0 asks." if cap == 0 else NONE_YET
        return {"columns": list(COLUMNS), "arms": [arm.name for arm in arms], "rows": []}, said
    said = f"The first {each} evaluation prompts of every arm and round" + (
        ", of each arm's first seed." if any(len(arm.views) > 1 for arm in arms) else "."
    )
    return {"columns": list(COLUMNS), "arms": [arm.name for arm in arms], "rows": rows}, said


def _row(arm: int, round: int, columns: dict[str, list[Any]], i: int) -> list[Any]:
    def of(name: str) -> Any:
        values = columns.get(name)
        return None if values is None else values[i]

    texts = [None if (text := of(name)) is None else shortened(text) for name in ("prompt", "response_1", "reference")]
    tokens = of("response_1_tokens")
    figures = [None if (x := number(of(name))) is None else round_to(x) for name in ("gold_1", "proxy", "kl_sft")]
    return [arm, round, *texts, *figures, None if tokens is None else len(tokens), of("ended_1")]


def shortened(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]}… ({len(text) - TEXT_LIMIT} more characters)"


def round_to(value: float) -> float:
    """Five significant digits: what a table shows, in a third of the bytes."""
    return float(f"{value:.5g}")
