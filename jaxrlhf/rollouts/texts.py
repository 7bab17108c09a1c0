"""Text from a policy folder: what `jaxrlhf generate` does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrlhf import rng
from jaxrlhf.data.batches import trim
from jaxrlhf.data.pairs import Prompt, read_prompts
from jaxrlhf.data.tokens import Limits, decode_responses, finished_responses, pad_id_of, tokenize_prompts
from jaxrlhf.models.hub import eos_ids, load
from jaxrlhf.rollouts.dataset import Sampling, renumbered, sample_dataset


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
) -> Iterator[dict[str, Any]]:
    """{"id", "prompt", "response", "sample", "finished"} a sample. Prompts over the limit are named on standard error and left out."""
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; at least 1 response a prompt is needed.")
    classes = _classes(folder)
    if any(name.endswith("SequenceClassification") for name in classes):
        raise ValueError(
            f"{folder} holds a reward model ({classes[0]}), which writes no text; name a policy folder, such as a stage …-policy."
        )
    loaded = load(folder, head="lm")
    if loaded.tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer; save one beside the model.")
    rows = _prompts(prompts, file, loaded.tokenizer)
    limits = Limits(max_prompt_length, max_new_tokens)
    table, report = tokenize_prompts(rows, loaded.tokenizer, limits)
    if report.dropped:
        print(report.summary(), file=sys.stderr)
    table, rows = trim(table, 8), [rows[i] for i in report.rows]
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids(loaded),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        vocab_size=len(loaded.tokenizer),
        pad_id=pad_id_of(loaded.tokenizer),
    )
    for sample in range(num_samples):
        key = rng.stream(rng.root_key(seed), "generate")
        texts = sample_dataset(loaded.model, loaded.params, renumbered(table, sample), key, sampling, batch_size=batch_size)
        responses = decode_responses(texts.response_BT, texts.response_mask_BT, loaded.tokenizer, sampling.eos_ids)  # type: ignore[arg-type]
        finished = finished_responses(texts.response_BT, texts.response_mask_BT, sampling.eos_ids)  # type: ignore[arg-type]
        for row, response, done in zip(rows, responses, finished, strict=True):
            yield {"id": row.id, "prompt": row.prompt, "response": response, "sample": sample, "finished": bool(done)}


def _classes(folder: str) -> list[str]:
    """What config.json says the model is; nothing where there is none (`load` says that better)."""
    path = Path(folder) / "config.json"
    return list(json.loads(path.read_text(encoding="utf-8")).get("architectures") or []) if path.is_file() else []


def _prompts(prompts: list[str], file: str | None, tokenizer: Any) -> list[Prompt]:
    if file is not None:
        rows, report = read_prompts(file, tokenizer=tokenizer)
        if report.dropped:
            print(report.summary(), file=sys.stderr)
        return rows
    lines = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise ValueError("there is no prompt: give one as an argument, with --file, or on standard input.")
    return [Prompt(str(i), text, f"prompt:{i}") for i, text in enumerate(lines)]
