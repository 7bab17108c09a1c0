"""Conversations into text through a tokenizer's own chat template, with the checks that keep user text from acting as control tokens."""

from __future__ import annotations

import json
import string
import sys
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from jaxrlhf.config import DataConfig
from jaxrlhf.data.read_report import DataError

if TYPE_CHECKING:  # importing transformers takes seconds, and a plan needs none of it
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
# Arguments of apply_chat_template that are no variables of a template: a row may not set them.
RENDER_ARGUMENTS = frozenset(
    [
        "conversation",
        "chat_template",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "add_generation_prompt",
        "continue_final_message",
        "messages",
        "tools",
        "documents",
    ]
)
_PROBE = "zqprobe"

# Stands in front of a template, which transformers hands plain data only.
_AT_DATE = (
    "{% macro strftime_now(format) %}{% set said = namespace(text=format) %}{% for each, text in WRITTEN.items() %}"
    "{% set said.text = said.text | replace(each, text) %}{% endfor %}{{ said.text }}{% endmacro %}\n"
)


class BadRow(ValueError):
    """One row that cannot be used; the message is its reason, "category: detail"."""


def check_messages(value: Any, field: str, specials: tuple[str, ...]) -> Messages:
    """`value` as a non-empty list of {role, content} with text contents, or BadRow.

    A content that spells a special token ("<|im_end|>") is refused: once rendered it could not be told from the template's own.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(f"mistyped field: {field} must be a non-empty list of messages")
    for n, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(f"mistyped field: {field}[{n}] must be an object with role and content")
        content = message.get("content")
        if not isinstance(content, str):
            raise BadRow(f"mistyped field: {field}[{n}].content must be text, not {type(content).__name__}")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow(f"not valid Unicode: {field}[{n}].content contains a lone surrogate") from None
        found = next((s for s in specials if s in content), None)
        if found is not None:
            raise BadRow(f"control token in a message: {field}[{n}].content contains {found!r}")
    return value


def special_strings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts of all special tokens, longest first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(added | set(tokenizer.all_special_tokens), key=lambda s: (-len(s), s)))


def require_template(tokenizer: PreTrainedTokenizerBase | None, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer, if it can render conversations; else a DataError that says what to give."""
    if tokenizer is None:
        raise DataError(f"{source}: the row is a conversation, which needs a tokenizer with a chat template; pass tokenizer=.")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{source}: the row is a conversation but the tokenizer has no chat template; set tokenizer.chat_template.")
    return tokenizer


@cache
def at_date(template: str, date: str) -> str:
    """The template with a `strftime_now` that is at `date` (ISO 8601) and not today, or a row would read otherwise tomorrow."""
    if "strftime_now" not in template:
        return template
    print(f"jaxrlhf: the chat template asks for the date, and is given {date} (data.template_date).", file=sys.stderr)
    directives = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters if letter != "s"]  # %s is of the time zone
    written = {each: datetime.fromisoformat(date).strftime(each) for each in directives}
    return _AT_DATE.replace("WRITTEN", json.dumps(written)) + template


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, options: dict[str, Any], **fixed: bool) -> str:
    arguments: dict[str, Any] = options | fixed | {"tokenize": False}
    try:
        template = tokenizer.get_chat_template(tools=options.get("tools"))
        arguments["chat_template"] = at_date(template, arguments.pop("template_date", DataConfig.template_date))
        return str(tokenizer.apply_chat_template(messages, **arguments))
    except Exception as error:  # a template is a program: it refuses rows by raising whatever it likes
        raise BadRow(f"chat template refused the row: {error}") from error


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Messages, **options: Any) -> str:
    """The text a response is sampled after. A conversation that ends with the assistant is continued, as in TRL."""
    if prompt[-1]["role"] == "assistant":
        return _render(tokenizer, prompt, options, continue_final_message=True)
    return _render(tokenizer, prompt, options, add_generation_prompt=True)


def render_response(tokenizer: PreTrainedTokenizerBase, prompt: Messages, response: Messages, **options: Any) -> tuple[str, str]:
    """(prompt text, response text) of one assistant message; the template's end token is left to tokenisation, which adds its id.

    The prompt text is the generation prompt, so that training and sampling see the same context; a template whose full rendering does
    not start with it is refused.
    """
    if len(response) != 1 or response[0]["role"] != "assistant":
        raise BadRow(f"not one reply: after the prompt there must be exactly one assistant message, found {[m['role'] for m in response]}")
    if prompt[-1]["role"] == "assistant":
        raise BadRow("not one reply: the prompt already ends with an assistant message")
    head = _render(tokenizer, prompt, options, add_generation_prompt=True)
    full = _render(tokenizer, prompt + response, options)
    if not full.startswith(head):
        raise BadRow("chat template is not a prefix: the rendered conversation does not start with the generation prompt")
    rest, content = full[len(head) :], response[0]["content"]
    content = content if content in rest else content.strip()  # many templates strip
    at = rest.rfind(content)
    if at < 0:
        raise BadRow("chat template changed the reply: its text is not in the rendered conversation")
    # What the template writes before the reply (a thinking block) is part of it; what it writes after is the end of the turn.
    return head, rest[: at + len(content)]


def chat_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends an assistant message; None without a template or a special end."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = _render(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": _PROBE}], {})
    except BadRow:
        return None
    tail = text[text.rfind(_PROBE) + len(_PROBE) :].strip()
    first = next((s for s in special_strings(tokenizer) if tail.startswith(s)), None)
    found: Any = None if first is None else tokenizer.convert_tokens_to_ids(first)
    return None if found is None else int(found)


def eos_ids_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's EOS first, then the chat template's end token. At least one, or a DataError."""
    given: tuple[Any, ...] = (tokenizer.eos_token_id, chat_end_id(tokenizer))
    found = [i for i in given if i is not None]
    if not found:
        raise DataError("the tokenizer has no EOS token; set tokenizer.eos_token to the token that ends a response.")
    return tuple(dict.fromkeys(int(i) for i in found))
