"""One raw row → the fields of a pair, a demonstration or a prompt, or `BadRow` with the reason. No file, no id, no loop in here."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from jaxrlhf.data.chat import (
    BadRow,
    Messages,
    chat_end_id,
    check_messages,
    check_strings,
    render,
    render_arguments,
    require_template,
    special_strings,
)
from jaxrlhf.data.read_report import DataError
from jaxrlhf.data.sources import Row, plain

if TYPE_CHECKING:  # importing transformers takes seconds, and a plan needs none of it
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "\n\nAssistant:"
_RESPONSES = ("completion", "response")
_OTHER = "other names: data.rename in a config, rename= in Python, and for a command in the file itself"
# EOS and PAD as data sets and programs spell them: TL;DR's references end in the first.
_ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end|>", "<|eos|>", "<|pad|>", "<end_of_turn>", "<eos>",
    "<pad>", "</s>", "[EOS]", "[PAD]", "<｜end▁of▁sentence｜>",
)  # fmt: skip
BARE = "responses with EOS or PAD spelled at the end (taken off)"


@dataclass
class Reading:
    """What every row of one pass is read with; `source` is the row at hand."""

    tokenizer: PreTrainedTokenizerBase | None
    implicit_prompt: str
    prompt_format: str
    response_format: str
    template_date: str
    counts: Counter[str]
    source: str = ""

    def __post_init__(self) -> None:
        if self.implicit_prompt not in ("assistant", "common_prefix"):
            raise DataError(f"implicit_prompt is {self.implicit_prompt!r}; it must be 'assistant' or 'common_prefix'.")
        for name in ("prompt_format", "response_format"):
            if getattr(self, name).count("{}") != 1:
                raise DataError(f"{name} is {getattr(self, name)!r}; it must contain {{}} once, where the text goes.")

    @cached_property
    def specials(self) -> tuple[str, ...]:
        return special_strings(self.template)

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The tokenizer's own EOS and PAD, and what its template ends a message with."""
        if self.tokenizer is None:
            return ()
        end = chat_end_id(self.tokenizer)
        own = (self.tokenizer.eos_token, self.tokenizer.pad_token, None if end is None else self.tokenizer.convert_ids_to_tokens(end))
        return tuple(str(token) for token in own if token)

    def reply(self, text: str, field: str) -> str:
        """A response without the EOS or PAD that is spelled at its end; BadRow where nothing else is there."""
        bare = without_end(text, self.ends)
        self.counts[BARE] += bare != text
        return _reply(bare, field)

    @property
    def template(self) -> PreTrainedTokenizerBase:
        return require_template(self.tokenizer, self.source)

    def frame_prompt(self, text: str) -> str:
        return self.prompt_format.replace("{}", text)  # not str.format: data contains braces

    def frame_response(self, text: str) -> str:
        return self.response_format.replace("{}", text)

    def messages(self, row: Row, field: str) -> Messages:
        return check_messages(row[field], field, self.specials if isinstance(row[field], list) else ())

    def render(self, row: Row, prompt: Messages, *replies: Messages) -> tuple[str, ...]:
        """The texts of a conversation: its prompt, and each reply to it."""
        return render(self.template, prompt, *replies, **self.options(row))

    def options(self, row: Row) -> dict[str, Any]:
        """What the template is given: a row's `tools` (or JSON of them) and `chat_template_kwargs`, as in TRL; the date is the reader's."""
        options, tools = row.get("chat_template_kwargs") or {}, row.get("tools")
        if not isinstance(options, dict):
            raise BadRow(f"mistyped field: chat_template_kwargs must be an object, not {type(options).__name__}")
        taken = sorted(render_arguments(self.template) & set(options)) if options else []
        if taken:
            raise BadRow(f"mistyped field: chat_template_kwargs sets {taken[0]}, which is the reader's to set")
        if isinstance(tools, str) and tools:
            try:
                tools = plain(json.loads(tools))
            except (ValueError, RecursionError) as error:
                raise BadRow(f"mistyped field: tools is text and not JSON: {error}") from None
        check_strings([options, tools], "tools or chat_template_kwargs", self.specials)
        return options | ({"tools": tools} if tools else {}) | {"template_date": self.template_date}


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise BadRow(f"mistyped field: {field} must be text, not {'null' if value is None else type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"not valid Unicode: {field} contains a lone surrogate") from None
    return value


def _reply(text: str, field: str) -> str:
    if not text.strip():
        raise BadRow(f"empty response: {field}")
    return text


def without_end(text: str, own: tuple[str, ...] = ()) -> str:
    """`text` without EOS and PAD spelled at its end, a tokenizer's `own` among them, and one space that joined them to it.

    `</s>` stays where the text has an `<s>` before it that is still open: HTML for what is struck through.
    The one place where that is done (T25): training, gold, judge, lengths and vectors all see what this leaves.
    """
    while found := _trailing(own).search(text):
        if found[1] == "</s>" and text.count("<s>", 0, found.start()) > text.count("</s>", 0, found.start()):
            break
        text = text[: found.start()]
    return text


@cache
def _trailing(own: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf" ?({'|'.join(map(re.escape, _ENDS + own))})\s*\Z")


def _has(row: Row, *fields: str) -> bool:
    """Whether the row has all these fields. A null is none: a table has every column in every row."""
    return all(row.get(field) is not None for field in fields)


def _check_reply(messages: Messages, field: str) -> None:
    if not (last := messages[-1] if messages else {}).get("tool_calls"):
        _reply(last.get("content", ""), field)


def _labelled_false(row: Row) -> bool:
    """An unpaired preference (KTO) against its completion; 0 is a file's way to write false, but another data set's class elsewhere."""
    label = row.get("label")
    return label is False or (label == 0 and any(_has(row, field) for field in _RESPONSES))


def _unknown(row: Row, expected: str) -> BadRow:
    if _has(row, "label") and any(_has(row, field) for field in _RESPONSES):
        return BadRow(
            "unpaired preference (KTO): a row with a label has one side; put one labelled true and one labelled false of the same prompt "
            f"together; expected {expected}"
        )
    if _has(row, "completions", "labels"):
        return BadRow(f"stepwise supervision: a label a step has no use here; join the steps into one text; expected {expected}")
    found = ", ".join(f"{name} (null)" if value is None else str(name) for name, value in row.items()) or "(none)"
    return BadRow(f"unknown schema: fields {found}; expected {expected} ({_OTHER})")


def pair_fields(row: Row, reading: Reading) -> dict[str, Any]:
    """prompt, chosen, rejected, margin, templated of a preference row."""
    if "chosen" not in row or "rejected" not in row:
        raise _unknown(row, "{prompt, chosen, rejected} or {chosen, rejected}")
    if isinstance(row["chosen"], list):
        found = _conversational_pair(row, reading)
    elif _has(row, "prompt"):
        found = _explicit_pair(row, reading)
    else:
        prompt, chosen, rejected = cut_prompt(_text(row, "chosen"), _text(row, "rejected"), reading.implicit_prompt)
        found = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    found |= {side: reading.reply(found[side], side) for side in ("chosen", "rejected")}
    if found["chosen"] == found["rejected"]:
        raise BadRow("identical sides: chosen equals rejected")
    return {"margin": _margin(row), "templated": row.get("templated") is True} | found


def _margin(row: Row) -> float | None:
    value = row.get("margin")
    if value is None:
        return None
    # the bound is float32's: a margin of 1e39 would become infinite in the table
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e38:
        raise BadRow(f"mistyped field: margin must be a finite number, not {value!r}")
    return float(value)


def _explicit_pair(row: Row, reading: Reading) -> dict[str, Any]:
    prompt, chosen, rejected = _text(row, "prompt"), _text(row, "chosen"), _text(row, "rejected")
    if prompt.strip() and chosen.startswith(prompt) and rejected.startswith(prompt):
        reading.counts["pairs whose responses repeat the prompt (kept as they are)"] += 1
    chosen, rejected = reading.reply(chosen, "chosen"), reading.reply(rejected, "rejected")
    return {"prompt": reading.frame_prompt(prompt), "chosen": reading.frame_response(chosen), "rejected": reading.frame_response(rejected)}


def cut_prompt(chosen: str, rejected: str, rule: str = "assistant") -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two texts that both begin with the prompt.

    "assistant": cut the longest common prefix after its last "\\n\\nAssistant:", so the sides always share one prompt. "common_prefix":
    cut at the common prefix itself, a trailing space going to the responses.
    """
    prefix = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - by character is what is wanted: these are texts
    if rule == "assistant":
        at = prefix.rfind(ASSISTANT)
        if at < 0:
            raise BadRow(
                f"no prompt: chosen and rejected share no {ASSISTANT!r}; add a prompt field, or cut wherever they part, as TRL does, by "
                "common_prefix: in a config data.implicit_prompt, of a command --implicit_prompt, in Python pass implicit_prompt="
            )
        at += len(ASSISTANT)
    else:
        at = len(prefix.removesuffix(" "))
    return chosen[:at], chosen[at:], rejected[at:]


def _conversational_pair(row: Row, reading: Reading) -> dict[str, Any]:
    chosen, rejected = reading.messages(row, "chosen"), reading.messages(row, "rejected")
    prompt = row.get("prompt")
    if isinstance(prompt, str) and chosen[0]["role"] != "assistant":
        prompt = None  # the sides hold the whole conversation and the field repeats its first message
    if prompt is None:
        same = 0
        while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
            same += 1
        if same == len(chosen) == len(rejected):
            raise BadRow("identical sides: chosen equals rejected")
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not prompt:
            raise BadRow("no prompt: chosen and rejected share no first message")
    elif isinstance(prompt, str):
        raise BadRow("mistyped field: prompt is text but chosen is a conversation; make both conversations")
    else:
        prompt = reading.messages(row, "prompt")
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        _check_reply(messages, side)
    head, chosen_text, rejected_text = reading.render(row, prompt, chosen, rejected)
    return {"prompt": head, "chosen": chosen_text, "rejected": rejected_text, "templated": True}


def demonstration_fields(row: Row, reading: Reading) -> dict[str, Any]:
    """prompt, response, templated of a row to imitate."""
    if _labelled_false(row):
        raise BadRow("labelled false: an unpaired preference that is no demonstration")
    if _has(row, "messages"):
        messages = reading.messages(row, "messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise BadRow("no reply: messages must end with an assistant message after a prompt")
        return _conversational_demonstration(messages[:-1], messages[-1:], row, reading)
    field = next((f for f in _RESPONSES if _has(row, f)), None)
    if field is None and _has(row, "chosen", "rejected"):
        pair = pair_fields(row, reading)
        return {"prompt": pair["prompt"], "response": pair["chosen"], "templated": pair["templated"]}
    if field is None and _has(row, "text") and not _has(row, "prompt"):
        return {"prompt": "", "response": reading.reply(_text(row, "text"), "text"), "templated": False}
    field = field or ("chosen" if _has(row, "chosen") else None)
    if field is None or not _has(row, "prompt"):
        raise _unknown(row, "{prompt, completion}, {prompt, chosen}, {chosen, rejected}, {messages} or {text}")
    if isinstance(row["prompt"], list):
        return _conversational_demonstration(reading.messages(row, "prompt"), reading.messages(row, field), row, reading)
    prompt, response = reading.frame_prompt(_text(row, "prompt")), reading.frame_response(reading.reply(_text(row, field), field))
    return {"prompt": prompt, "response": response, "templated": row.get("templated") is True}


def _conversational_demonstration(prompt: Messages, response: Messages, row: Row, reading: Reading) -> dict[str, Any]:
    _check_reply(response, "response")
    head, text = reading.render(row, prompt, response)
    return {"prompt": head, "response": reading.reply(text, "response"), "templated": True}


def prompt_fields(row: Row, reading: Reading) -> dict[str, Any]:
    """prompt, reference, templated of a row to sample from; the reference is the row's own good response, if it has one."""
    if _has(row, "prompt") and not any(_has(row, f) for f in (*_RESPONSES, "chosen")):
        if isinstance(row["prompt"], list):
            return {"prompt": reading.render(row, reading.messages(row, "prompt"))[0], "templated": True}
        text = _text(row, "prompt")
        if not text.strip():
            raise BadRow("empty prompt: nothing to answer")
        return {"prompt": reading.frame_prompt(text), "templated": row.get("templated") is True}
    if not _has(row, "prompt") and (_has(row, "text") or not (_has(row, "messages") or _has(row, "chosen", "rejected"))):
        raise _unknown(row, "{prompt}, {prompt, completion}, {prompt, chosen}, {chosen, rejected} or {messages}")
    found = demonstration_fields({k: v for k, v in row.items() if k != "label"}, reading)
    if not found["prompt"].strip():
        raise BadRow("empty prompt: nothing to answer")
    response = found.pop("response")
    return found | {"reference": None if _labelled_false(row) else response}
