"""Texts → ids: BOS, EOS, and special tokens that are spelled in text. Only `tokens.py` calls it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxrlhf.data.chat import chat_end_id, special_strings
from jaxrlhf.data.read_report import DataError

if TYPE_CHECKING:  # importing transformers takes seconds, and a plan needs none of it
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


class Encoder:
    """Texts → ids for rows of which some are templated; counts what it noticed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int] | None, templated: Sequence[bool]) -> None:
        if eos_ids is not None and not eos_ids:
            raise DataError("eos_ids is empty; give at least the tokenizer's EOS (eos_ids_of(tokenizer)).")
        self.tokenizer, self.eos_ids = tokenizer, tuple(int(i) for i in eos_ids or ())
        self.templated = templated
        self.end = [self._end(t) for t in (False, True)] if self.eos_ids and any(templated) else [self.eos_ids[:1]] * 2
        self.counts: Counter[str] = Counter()
        self.bos = _leading_ids(tokenizer)
        self.special_text = re.compile("|".join(map(re.escape, special_strings(tokenizer))) or r"(?!)")

    def _end(self, templated: bool) -> tuple[int, ...]:
        """The id that ends a response, as a tuple of one."""
        end = chat_end_id(self.tokenizer) if templated else None
        if end is not None and end not in self.eos_ids:
            token = self.tokenizer.convert_ids_to_tokens(end)
            raise DataError(
                f"the chat template ends a message with {token!r} (id {end}), not in eos_ids {self.eos_ids}; pass eos_ids_of(tokenizer)."
            )
        return self.eos_ids[:1] if end is None else (end,)

    def _ids(self, texts: Sequence[str]) -> list[Ids]:
        """Ids without BOS or EOS; specials stay text unless the row is templated."""
        out: list[Ids] = [[]] * len(texts)
        for parse in (False, True):
            at = [i for i, p in enumerate(self.templated) if p == parse]
            if not at:
                continue
            found = self.tokenizer(
                [texts[i] for i in at], add_special_tokens=False, split_special_tokens=not parse, return_attention_mask=False, verbose=False
            )["input_ids"]
            for i, ids in zip(at, found, strict=True):
                out[i] = list(ids)
            if not parse:
                spelled = sum(bool(self.special_text.search(texts[i])) for i in at)
                self.counts["texts that spell a special token (kept as text)"] += spelled
        return out

    def prompts(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of prompts, BOS once in front; a prompt of no tokens becomes the start token (BOS, else EOS)."""
        rows = [ids if self.bos and ids[: len(self.bos)] == self.bos else self.bos + ids for ids in self._ids(texts)]
        if all(rows):
            return rows
        given: tuple[Any, ...] = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, *self.eos_ids)
        start = next((i for i in given if i is not None), None)
        if start is None:
            raise DataError("an empty prompt needs a start token, and the tokenizer has neither BOS nor EOS; set one.")
        return [ids or [int(start)] for ids in rows]

    def responses(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of responses with their EOS; nothing stands after a first EOS (inside a text there is one only in templated rows)."""
        ends, out = set(self.eos_ids), []
        for ids, templated in zip(self._ids(texts), self.templated, strict=True):
            stop = next((k for k, i in enumerate(ids) if i in ends), len(ids))
            out.append(ids[: stop + 1] if stop < len(ids) else [*ids, *self.end[templated]])
        return out


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """What the tokenizer puts in front of a text by itself (BOS, [CLS]), nothing for most."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    at = next((k for k in range(len(full) - len(plain) + 1) if full[k : k + len(plain)] == plain), 0)
    return full[:at]
