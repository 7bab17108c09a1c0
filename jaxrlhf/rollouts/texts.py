"""Text from a policy folder: for `jaxrlhf generate` and for comparisons."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxrlhf import rng
from jaxrlhf.data.batches import trim
from jaxrlhf.data.pairs import Prompt, read_prompts
from jaxrlhf.data.tokens import Limits, finished_responses, tokenize_prompts
from jaxrlhf.models.hub import Loaded, classes_of, load
from jaxrlhf.rollouts.dataset import Sampling, renumbered, sample_texts
from jaxrlhf.types import PromptBatch


def generate_texts(
    *,
    folder: str,
    prompts: list[str],
    file: str | None,
    max_new_tokens: int,
    max_prompt_length: int,
    temperature: float,
    top_k: int,
    top_p: float,
    num_samples: int,
    batch_size: int,
    seed: int,
    **reading: Any,
) -> Iterator[dict[str, Any]]:
    """{"id", "prompt", "response", "sample", "finished"} a sample. Prompts over the limit are named on standard error and left out.
    `reading`: keywords of `read_prompts`."""
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; at least 1 response a prompt is needed.")
    classes = classes_of(Path(folder))
    if any(name.endswith("SequenceClassification") for name in classes):
        raise ValueError(
            f"{folder} holds a reward model ({classes[0]}), which writes no text; name a policy folder, such as a stage …-policy."
        )
    loaded = policy_named(folder)
    rows = _prompts(prompts, file, tokenizer=loaded.tokenizer, **reading)
    table, kept = tokens_of(loaded, rows, Limits(max_prompt_length, max_new_tokens))
    sampling = Sampling.of(loaded, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    key = rng.stream(rng.root_key(seed), "generate")
    for sample in range(num_samples):
        told = answers(loaded, renumbered(table, sample), key, sampling, batch_size=batch_size)
        for row, (response, finished) in zip((rows[i] for i in kept), told, strict=True):
            yield {"id": row.id, "prompt": row.prompt, "response": response, "sample": sample, "finished": finished}


def policy_named(folder: str, *, dtype: str | None = None) -> Loaded:
    """A policy that can be asked in text. Raises ValueError where it has no tokenizer; otherwise what `load` raises."""
    loaded = load(folder, head="lm", dtype=dtype)
    if loaded.tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer; save one beside the model.")
    return loaded


def tokens_of(loaded: Loaded, rows: list[Prompt], limits: Limits, *, name: str = "") -> tuple[PromptBatch, list[int]]:
    """(tokens, positions in `rows`) of the prompts within the limits; the others are named on standard error, after `name`."""
    table, report = tokenize_prompts(rows, loaded.tokenizer, limits)
    report.say(name)
    return trim(table, 8), report.rows


def answers(loaded: Loaded, table: PromptBatch, key: jax.Array, sampling: Sampling, **how: Any) -> list[tuple[str, bool]]:
    """(response, did it end by itself) to every prompt; `how` as `sample_dataset` takes it."""
    out, texts = sample_texts(loaded, table, key, sampling, **how)
    ended = finished_responses(out.response_BT, out.response_mask_BT, sampling.eos_ids)  # type: ignore[arg-type]
    return list(zip(texts, ended.tolist(), strict=True))


def _prompts(prompts: list[str], file: str | None, **reading: Any) -> list[Prompt]:
    if file is not None:
        rows, report = read_prompts(file, **reading)
        report.say()
        return rows
    lines = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise ValueError("there is no prompt: give one as an argument, with --file, or on standard input.")
    return [Prompt(str(i), text, f"prompt:{i}") for i, text in enumerate(lines)]
