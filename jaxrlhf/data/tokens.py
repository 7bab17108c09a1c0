"""The one place where text becomes ids and masks; supervised training, rewards, PPO, DPO, scoring and evaluation all come through here.

Prompt and response are tokenised separately and concatenated, so a response has the same ids in training and after sampling.
Prompts are left-padded to `max_prompt_length`, responses right-padded to `max_response_length`: shapes follow from the limits
alone (`batches.trim` cuts padding). Masks are made from lengths and carried, so PAD may equal EOS.

- BOS (whatever the tokenizer puts in front of a text) stands once at the start of the prompt. A prompt of no tokens becomes one
  start token.
- A response from data ends in EOS unless it was truncated. EOS or PAD spelled at its end is gone since it was read (`without_end`).
- Special tokens spelled inside text stay text: `<|endoftext|>` in a prompt does not end it. In rows marked `templated` they
  are control tokens, and their responses end in the chat template's end token.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxrlhf.data.chat import eos_ids_of
from jaxrlhf.data.encode import Encoder, Ids
from jaxrlhf.data.pairs import Demonstration, Pair, Prompt
from jaxrlhf.data.read_report import DataError, ReadReport
from jaxrlhf.types import PairBatch, PromptBatch, TextBatch

if TYPE_CHECKING:  # importing transformers takes seconds, and a plan needs none of it
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Limits:
    """How long prompts and responses may be, in tokens (BOS and EOS included), and what happens to longer ones.

    long_prompt: "drop" the row, or "truncate" from the left, keeping BOS. long_response: "truncate" from the right, then without EOS,
    or "drop".
    """

    max_prompt_length: int
    max_response_length: int
    long_prompt: Literal["drop", "truncate"] = "drop"
    long_response: Literal["drop", "truncate"] = "truncate"

    def __post_init__(self) -> None:
        for name in ("max_prompt_length", "max_response_length"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}; it must be at least 1 token.")
        for name in ("long_prompt", "long_response"):
            if getattr(self, name) not in ("drop", "truncate"):
                raise DataError(f"{name} is {getattr(self, name)!r}; it must be 'drop' or 'truncate'.")


def tokenize_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, limits: Limits, *, eos_ids: Sequence[int]
) -> tuple[PairBatch, ReadReport]:
    """Pairs as one PairBatch of numpy arrays with leading N (weights 1, index_B = 0..N-1), and what was dropped or cut.

    `report.rows[i]` is the position in `pairs` of table row i. A pair whose sides become equal by truncation is dropped: it says nothing.
    Where any pair has a margin, `columns["margin"]` holds them, 0 for pairs without. Raises DataError if no row is left.
    """
    encode = Encoder(tokenizer, eos_ids, [p.templated for p in pairs])
    prompts = encode.prompts([p.prompt for p in pairs])
    sides = [encode.responses([p.chosen for p in pairs]), encode.responses([p.rejected for p in pairs])]
    report = _within(pairs, prompts, sides, encode, limits)
    columns, given = {}, [pairs[i].margin for i in report.rows]
    if any(margin is not None for margin in given):
        columns["margin"] = margins(given)
        report.counts["pairs without a margin (taken as 0)"] = given.count(None)
    prompts, chosen, rejected = ([side[i] for i in report.rows] for side in (prompts, *sides))
    return pair_batch(prompts, chosen, rejected, limits, pad_id_of(tokenizer), columns), report


def tokenize_demonstrations(
    rows: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, limits: Limits, *, eos_ids: Sequence[int]
) -> tuple[TextBatch, ReadReport]:
    """Demonstrations as one TextBatch with leading N; otherwise as `tokenize_pairs`."""
    encode = Encoder(tokenizer, eos_ids, [r.templated for r in rows])
    prompts, responses = encode.prompts([r.prompt for r in rows]), encode.responses([r.response for r in rows])
    report = _within(rows, prompts, [responses], encode, limits)
    prompts, responses = ([side[i] for i in report.rows] for side in (prompts, responses))
    return text_batch(prompts, responses, limits, pad_id_of(tokenizer)), report


def tokenize_prompts(rows: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> tuple[PromptBatch, ReadReport]:
    """Prompts as one PromptBatch with leading N; otherwise as `tokenize_pairs`."""
    encode = Encoder(tokenizer, None, [r.templated for r in rows])
    prompts = encode.prompts([r.prompt for r in rows])
    report = _within(rows, prompts, [], encode, limits)
    table = pad_left([prompts[i] for i in report.rows], limits.max_prompt_length, pad_id_of(tokenizer))
    return PromptBatch(*table, np.ones(report.kept, bool), np.arange(report.kept, dtype=np.int32)), report  # type: ignore[arg-type]


def retokenize_responses(
    prompts: Sequence[str],
    responses: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    *,
    eos_ids: Sequence[int],
    finished: Sequence[bool] | np.ndarray | None = None,
    templated: bool = False,
) -> tuple[TextBatch, ReadReport]:
    """Sampled text for a model with another tokenizer: row i in is row i out, nothing is dropped whatever the limits say.

    Over-long prompts lose their left, over-long responses their right end. `finished[i]` False (the sampler hit its length limit)
    leaves EOS off; an empty response still gets one, so that every row has a last token to read a score at.
    """
    if len(prompts) != len(responses):
        raise DataError(f"{len(prompts)} prompts but {len(responses)} responses; give one prompt a response.")
    encode = Encoder(tokenizer, eos_ids, [templated] * len(prompts))
    heads, bodies = encode.prompts(prompts), encode.responses(responses)
    if finished is not None:
        bodies = [ids if done or len(ids) == 1 else ids[:-1] for ids, done in zip(bodies, finished, strict=True)]
    keep = Limits(limits.max_prompt_length, limits.max_response_length, "truncate", "truncate")
    report = ReadReport(kept=len(heads), counts=encode.counts, rows=list(range(len(heads))))
    for i in range(len(heads)):
        _fit(i, heads, [bodies], encode.bos, keep, report.counts, empty=True)
    return text_batch(heads, bodies, limits, pad_id_of(tokenizer)), report


def decode_responses(tokens_BT: np.ndarray, mask_BT: np.ndarray, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> list[str]:
    """The text of each response: tokens under the mask and before the first EOS, special tokens left out.

    A sentencepiece decoder strips the space in front of a text that stands alone; `_anchor` prevents it.
    """
    tokens, mask, ends = np.asarray(tokens_BT), np.asarray(mask_BT, bool), np.asarray(list(eos_ids))
    anchor, cut = _anchor(tokenizer)
    rows = []
    for row, keep in zip(tokens, mask, strict=True):
        ids = row[keep]
        stops = np.flatnonzero(np.isin(ids, ends))
        rows.append(anchor + [int(i) for i in (ids[: stops[0]] if len(stops) else ids)])
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False) if rows else []
    return [text[cut:] for text in texts]


def _anchor(tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, int]:
    """Ids of a letter to decode in front of a response, and the length of text to cut off afterwards.

    None where tokens are joined by spaces (no decoder) or the letter is not in the vocabulary: decoding is plain there.
    """
    ids = [int(i) for i in tokenizer("a", add_special_tokens=False)["input_ids"]]
    joined_by_spaces = tokenizer.backend_tokenizer.decoder is None  # type: ignore[attr-defined]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return ([], 0) if joined_by_spaces or text != "a" else (ids, 1)


def finished_responses(tokens_BT: np.ndarray, mask_BT: np.ndarray, eos_ids: Sequence[int]) -> np.ndarray:
    """bool_B: does the response contain an EOS under its mask (rather than having hit the length limit)?"""
    return np.any(np.isin(np.asarray(tokens_BT), list(eos_ids)) & np.asarray(mask_BT, bool), axis=1)


def pad_left(rows: Sequence[Ids], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32 tokens, bool mask), each [len(rows), width], tokens at the right edge."""
    tokens, mask = pad_right([ids[::-1] for ids in rows], width, pad_id)
    return np.ascontiguousarray(tokens[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])


def pad_right(rows: Sequence[Ids], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32 tokens, bool mask), each [len(rows), width], tokens at the left edge. A row longer than `width` is a ValueError."""
    lengths = np.array([len(ids) for ids in rows], np.int32)
    if len(rows) and lengths.max() > width:
        raise ValueError(f"row {int(lengths.argmax())} has {int(lengths.max())} tokens and the width is {width}; truncate before padding.")
    mask = np.arange(width)[None, :] < lengths[:, None]
    tokens = np.full((len(rows), width), pad_id, np.int32)
    tokens[mask] = np.fromiter((i for ids in rows for i in ids), np.int32, int(lengths.sum()))
    return tokens, mask


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padding: PAD, else EOS, else 0. Masks never depend on it."""
    given: tuple[Any, ...] = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return int(next((i for i in given if i is not None), 0))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that give a text the same ids: vocabulary, merges, normalisation, BOS, EOS, and what its chat template uses.

    Special tokens that are in no use do not count, so a copy that only gained a padding token is still the same tokenizer.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    template = str(getattr(tokenizer, "chat_template", None) or "")
    used = {str(tokenizer.bos_token), str(tokenizer.eos_token)}
    added = [t for t in backend.get("added_tokens", []) if not t["special"] or t["content"] in used or t["content"] in template]
    parts = [backend.get(k) for k in ("normalizer", "pre_tokenizer", "post_processor", "model")]
    facts = [parts, sorted(added, key=lambda t: t["id"]), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8")).hexdigest()[:32]


def _fit(
    i: int, prompts: list[Ids], sides: list[list[Ids]], bos: Ids, limits: Limits, counts: Counter[str], *, empty: bool = False
) -> str | None:
    """Bring row i within the limits, in place; or the reason to drop it. `empty`: a response may be EOS alone."""
    long = len(prompts[i])
    if long > limits.max_prompt_length and limits.long_prompt == "drop":
        return f"prompt too long: {long} tokens, limit {limits.max_prompt_length}"
    for side in sides:
        if len(side[i]) == 1 and not empty:
            return "empty response: nothing but EOS"
        if len(side[i]) > limits.max_response_length and limits.long_response == "drop":
            return f"response too long: {len(side[i])} tokens with EOS, limit {limits.max_response_length}"
    if long > limits.max_prompt_length:
        room = limits.max_prompt_length
        lead = bos if bos and room > len(bos) and prompts[i][: len(bos)] == bos else []
        prompts[i] = lead + prompts[i][long - (room - len(lead)) :]
        counts["prompts truncated"] += 1
    for side in sides:
        if len(side[i]) > limits.max_response_length:
            side[i] = side[i][: limits.max_response_length]
            counts["responses truncated"] += 1
    return None


def _within(rows: Sequence[Any], prompts: list[Ids], sides: list[list[Ids]], encode: Encoder, limits: Limits) -> ReadReport:
    """Bring all rows within the limits, in place; `report.rows` are the numbers of those that are left. DataError where none is."""
    report = ReadReport(counts=encode.counts)
    for i, row in enumerate(rows):
        reason = _fit(i, prompts, sides, encode.bos, limits, report.counts)
        if reason is None and len(sides) == 2 and sides[0][i] == sides[1][i]:
            reason = "identical sides as tokens: after truncation chosen equals rejected"
        if reason is None:
            report.rows.append(i)
        else:
            report.dropped.append((row.source, reason))
    report.kept = len(report.rows)
    if not report.kept:
        raise DataError(f"no row is left within {limits}:\n{report.summary()}")
    return report


def text_batch(prompts: Sequence[Ids], responses: Sequence[Ids], limits: Limits, pad_id: int) -> TextBatch:
    """Tokens as one numpy table, as wide as the limits."""
    n = len(prompts)
    sides = (*pad_left(prompts, limits.max_prompt_length, pad_id), *pad_right(responses, limits.max_response_length, pad_id))
    return TextBatch(*sides, np.ones(n, bool), np.arange(n, dtype=np.int32))  # type: ignore[arg-type]


def pair_batch(
    prompts: Sequence[Ids], chosen: Sequence[Ids], rejected: Sequence[Ids], limits: Limits, pad_id: int, columns: dict[str, Any]
) -> PairBatch:
    """Tokens of pairs as one numpy table, as wide as the limits; weights 1."""
    n = len(prompts)
    sides = (*pad_left(prompts, limits.max_prompt_length, pad_id), *pad_right(chosen, limits.max_response_length, pad_id))
    sides += pad_right(rejected, limits.max_response_length, pad_id)
    return PairBatch(*sides, np.ones(n, np.float32), np.ones(n, bool), np.arange(n, dtype=np.int32), columns)  # type: ignore[arg-type]


def margins(given: Sequence[float | None]) -> np.ndarray:
    return np.array([margin or 0.0 for margin in given], np.float32)


__all__ = [
    "Limits", "decode_responses", "eos_ids_of", "finished_responses", "margins", "pad_id_of", "pad_left", "pad_right", "pair_batch",
    "retokenize_responses", "text_batch", "tokenize_demonstrations", "tokenize_pairs", "tokenize_prompts", "tokenizer_fingerprint",
]  # fmt: skip
