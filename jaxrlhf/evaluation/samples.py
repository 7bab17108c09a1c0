"""samples.parquet: what a policy wrote for the evaluation prompts, and how it was scored."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.data.pairs import Prompt
from jaxrlhf.data.tables import read_table, unpadded, write_table
from jaxrlhf.data.tokens import Limits, finished_responses, text_batch
from jaxrlhf.types import TextBatch

SAMPLES = "samples.parquet"


class Samples(NamedTuple):
    """Two responses of one policy to every evaluation prompt, as text and tokens, with gold where there is gold."""

    rows: list[Prompt]
    tables: tuple[TextBatch, TextBatch]
    texts: tuple[list[str], list[str]]
    gold: tuple[np.ndarray, np.ndarray] | None


def write_samples(
    folder: Path,
    samples: Samples,
    kl: np.ndarray,
    eos: tuple[int, ...],
    *,
    proxy: np.ndarray | None = None,
    proxy_start: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """One row a prompt: both responses with their tokens, whether they ended, and gold; `proxy` scores the first.

    proxy_start_1 and proxy_start_2 are the same reward model's scores of the two responses that the policy ENTERING the round gave to the
    same prompts; those texts stand in the evaluation of the round before.
    """
    columns: dict[str, Any] = {
        "id": [row.id for row in samples.rows],
        "prompt": [row.prompt for row in samples.rows],
        "reference": [row.reference for row in samples.rows],
        "prompt_tokens": unpadded(samples.tables[0].prompt_BL, samples.tables[0].prompt_mask_BL),  # type: ignore[arg-type]
        "kl_sft": kl.tolist(),
    }
    if proxy is not None:
        columns["proxy"] = proxy.tolist()
    if proxy_start is not None:
        columns |= {f"proxy_start_{side}": scores.tolist() for side, scores in enumerate(proxy_start, start=1)}
    for side, (table, text) in enumerate(zip(samples.tables, samples.texts, strict=True), start=1):
        columns[f"response_{side}"] = text
        columns[f"response_{side}_tokens"] = unpadded(table.response_BT, table.response_mask_BT)  # type: ignore[arg-type]
        columns[f"ended_{side}"] = finished_responses(table.response_BT, table.response_mask_BT, eos).tolist()  # type: ignore[arg-type]
        if samples.gold is not None:
            columns[f"gold_{side}"] = samples.gold[side - 1].tolist()
    L, T = samples.tables[0].prompt_BL.shape[1], samples.tables[0].response_BT.shape[1]
    write_table(folder / SAMPLES, columns, prompt_width=L, response_width=T)


def read_samples(folder: Path, pad_id: int) -> Samples:
    """What `write_samples` wrote into a folder; its tokens are padded with `pad_id`."""
    columns, facts = read_table(folder / SAMPLES)
    widths = Limits(int(facts["prompt_width"]), int(facts["response_width"]))
    rows = [Prompt(i, p, "", r) for i, p, r in zip(columns["id"], columns["prompt"], columns["reference"], strict=True)]
    tables = tuple(text_batch(columns["prompt_tokens"], columns[f"response_{side}_tokens"], widths, pad_id) for side in (1, 2))
    gold = tuple(np.array(columns[f"gold_{side}"], np.float32) for side in (1, 2)) if "gold_1" in columns else None
    return Samples(rows, tables, (columns["response_1"], columns["response_2"]), gold)  # type: ignore[arg-type]
