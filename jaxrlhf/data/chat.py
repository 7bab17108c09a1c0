"""Conversations into text through a tokenizer's own chat template, with the checks that keep user text from acting as control tokens."""

from __future__ import annotations

import inspect
import json
import re
import string
import sys
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrlhf.config import DataConfig
from jaxrlhf.data.read_report import DataError

if TYPE_CHECKING:  # importing transformers takes seconds, and a plan needs none of it
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
PROBE = "zqprobe"  # stands in for a content to see what a template writes around it
_SURROGATE = re.compile("[\ud800-\udfff]")

# Stands in front of a template, which transformers hands plain data only.
_AT_DATE = (
    "{% macro strftime_now(format) %}{% set said = namespace(text=format) %}{% for each, text in WRITTEN.items() %}"
    "{% set said.text = said.text | replace(each, text) %}{% endfor %}{{ said.text }}{% endmacro %}\n"
)


class BadRow(ValueError):
    """One row that cannot be used; the message is its reason, "category: detail"."""


def check_messages(value: Any, field: str, specials: tuple[str, ...]) -> Messages:
    """`value` as a non-empty list of {role, content, …} with text contents, or BadRow. What is null is left out, as transformers does.

    Beside tool_calls there need be no content; parts of type text are joined without a separator, as templates that take parts write them.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(f"mistyped field: {field} must be a non-empty list of messages")
    return [_message(message, f"{field}[{n}]", specials) for n, message in enumerate(value)]


def _message(given: Any, where: str, specials: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise BadRow(f"mistyped field: {where} must be an object with role and content")
    message = {name: value for name, value in given.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list) and content:
        message["content"] = content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise BadRow(f"mistyped field: {where}.content must be text, not {type(content).__name__}")
    check_strings(message, where, specials)
    return message


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BadRow(f"mistyped field: {where}.content has a part of type {kind!r}; only {{type: text, text: …}} can be read")
    return part["text"]


def check_strings(value: Any, where: str, specials: tuple[str, ...]) -> None:
    """BadRow where a string anywhere in `value` is no text, or spells a special token: rendered, it would be the template's own."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            rest += [*one, *one.values()]
        elif isinstance(one, list):
            rest += one
        elif isinstance(one, str):
            if _SURROGATE.search(one):
                raise BadRow(f"not valid Unicode: {where} contains a lone surrogate")
            found = next((s for s in specials if s in one), None)
            if found is not None:
                raise BadRow(f"control token in a message: {where} contains {found!r}")


def template_of(given: str) -> str:
    """The chat template that a config gives: Jinja, or the name of a file of it."""
    if "{" in given:
        return checked_template(given, "tokenizer.chat_template")
    try:
        template = Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileNotFoundError(f"tokenizer.chat_template is {given!r}, neither a Jinja template nor a file of one ({error}).") from error
    return checked_template(template, f"tokenizer.chat_template, {given},")


def checked_template(template: str, where: str) -> str:
    """The template. DataError where it is no Jinja: once and where it is given, not of every row."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=template)  # compiles it, and renders nothing
    except TemplateSyntaxError as error:
        raise DataError(f"{where} is no valid Jinja template: {error.message} (line {error.lineno}); mend or remove it.") from error
    return template


def special_strings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts of all special tokens, longest first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(added | set(tokenizer.all_special_tokens), key=lambda s: (-len(s), s)))


def require_template(tokenizer: PreTrainedTokenizerBase | None, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer, if it can render conversations; else a DataError that says what to give."""
    if getattr(tokenizer, "chat_template", None):
        return tokenizer  # type: ignore[return-value]
    lack = "which needs a tokenizer" if tokenizer is None else "but the tokenizer has no chat template"
    raise DataError(
        f"{source}: the row is a conversation, {lack}; name one that has: in a config tokenizer.source, or a template in a config "
        "tokenizer.chat_template; of a command --tokenizer (`generate`: the policy's own); in Python pass tokenizer=."
    )


@cache
def at_date(template: str, date: str) -> str:
    """The template with a `strftime_now` that is at `date` (ISO 8601) and not today, or a row would read otherwise tomorrow."""
    if "strftime_now" not in template:
        return template
    directives = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters if letter != "s"]  # %s is of the time zone
    written = {each: datetime.fromisoformat(date).strftime(each) for each in directives}
    return _AT_DATE.replace("WRITTEN", json.dumps(written)) + template


@cache
def _say_date(template: str, date: str) -> None:
    """Once; not where a template is only looked at for its end."""
    if "strftime_now" in template:
        print(f"jaxrlhf: the chat template asks for the date, and is given {date} (data.template_date).", file=sys.stderr)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, options: dict[str, Any], **fixed: bool) -> str:
    arguments: dict[str, Any] = options | fixed | {"tokenize": False}
    try:
        template = tokenizer.get_chat_template(tools=options.get("tools"))
        arguments["chat_template"] = at_date(template, arguments.pop("template_date", DataConfig.template_date))
        return str(tokenizer.apply_chat_template(messages, **arguments))
    except Exception as error:  # a template is a program: it refuses rows by raising whatever it likes
        raise BadRow(f"chat template refused the row: {error}") from error


def _render_all(tokenizer: PreTrainedTokenizerBase, messages: Messages, options: dict[str, Any], *, start: int = 0, **fixed: bool) -> str:
    """The rendered messages; BadRow where a call, the content beside one or another role's, from message `start` on, does not change
    the text."""
    text = _render(tokenizer, messages, options, **fixed)
    _say_date(tokenizer.get_chat_template(tools=options.get("tools")), options.get("template_date", DataConfig.template_date))
    for n, message in enumerate(messages[start:], start):
        holds = {"tool_calls": message.get("tool_calls"), "content": message.get("content", "").strip()}
        parts = [what for what, value in holds.items() if value] or ["content"]
        if parts == ["content"] and message["role"] in ("user", "assistant"):
            continue  # what every template is for
        for what in parts:
            other = message | {what: [] if what == "tool_calls" else PROBE}
            try:
                lost = _render(tokenizer, [*messages[:n], other, *messages[n + 1 :]], options, **fixed) == text
            except BadRow:
                continue  # it was read
            if lost:
                raise BadRow(
                    f"lost in the chat template: it writes nothing of the {what} of role {message['role']!r}; give a template that does "
                    "(tokenizer.chat_template), or the message another role"
                )
    return text


def around(tokenizer: PreTrainedTokenizerBase, messages: Messages, options: dict[str, Any], **fixed: bool) -> tuple[str, str]:
    """What the template writes before and after the content of the last message. BadRow where it does not write it as it is."""
    text = _render(tokenizer, [*messages[:-1], messages[-1] | {"content": PROBE}], options, **fixed)
    before, found, after = text.rpartition(PROBE)  # the last one: a user may have written the word too
    if not found:
        raise BadRow("chat template changed the reply: a word in its place is not in the rendered conversation")
    return before, after


def render_arguments(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Arguments of apply_chat_template, which are no variables of a template: a row may not set them."""
    return {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}


def render(tokenizer: PreTrainedTokenizerBase, prompt: Messages, /, *replies: Messages, **options: Any) -> tuple[str, ...]:
    """(prompt text, a response text for each of `replies`, which are one assistant message each).

    The prompt text is the generation prompt, so that training and sampling see the same context; a template whose full rendering does
    not start with it is refused. Alone, a prompt that ends with the assistant is continued, as in TRL. A response is the rest, less what
    the template writes after any reply: its end token is left to tokenisation, which adds its id. What it writes before the reply (a
    thinking block) is part of the response.
    """
    if not replies and prompt[-1]["role"] == "assistant":
        return (_render_all(tokenizer, prompt, options, continue_final_message=True),)
    for reply in replies:
        if len(reply) != 1 or reply[0]["role"] != "assistant":
            roles = [m["role"] for m in reply]
            raise BadRow(f"not one reply: after the prompt there must be exactly one assistant message, found {roles}")
    if prompt[-1]["role"] == "assistant":
        raise BadRow("not one reply: the prompt already ends with an assistant message")
    head = _render_all(tokenizer, prompt, options, add_generation_prompt=True)
    tail = around(tokenizer, [*prompt, {"role": "assistant"}], options)[1] if replies else ""
    texts = [head]
    for reply in replies:
        full = _render_all(tokenizer, prompt + reply, options, start=len(prompt))
        if not full.startswith(head):
            raise BadRow("chat template is not a prefix: the rendered conversation does not start with the generation prompt")
        rest = full[len(head) :]
        text, content = rest.removesuffix(tail), reply[0].get("content", "").strip()  # many templates strip
        there = content in text if reply[0].get("tool_calls") else text.rstrip().endswith(content)  # calls stand behind it
        if not rest.endswith(tail) or not there:
            raise BadRow("chat template changed the reply: its text is not where the template writes replies")
        texts.append(text)
    return tuple(texts)


def chat_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends an assistant message; None without a template or a special end."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        tail = around(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant"}], {})[1].strip()
    except BadRow:
        return None
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
