"""What an endpoint's reply says, whatever its shape, and what one question has taken so far."""

import re
import time
from dataclasses import dataclass, field
from typing import Any

_THOUGHTS = frozenset({"thinking", "reasoning"})  # parts that stand before an answer, as <think> does in text


@dataclass
class Usage:
    """The texts, token counts (prompt, completion; None where a reply told none) and requests of one question, an answered one or not."""

    texts: list[str] = field(default_factory=list)
    tokens: list[tuple[int, int] | None] = field(default_factory=list)
    requests: int = 0
    started: float = field(default_factory=time.time)

    def facts(self) -> dict[str, Any]:
        """The fields of a stored line. A sum is null where one of its counts is missing."""
        known = [pair for pair in self.tokens if pair is not None]
        sums = [sum(pair[side] for pair in known) if len(known) == len(self.tokens) else None for side in (0, 1)]
        return {
            "prompt_tokens": sums[0],
            "completion_tokens": sums[1],
            "requests": self.requests,
            "seconds": round(time.time() - self.started, 3),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def text_of(reply: Any) -> str | None:
    """The text of a completion's first choice; None where the reply is no completion: an error, no choice, no message, no text.

    The client library checks no types, so neither do its annotations hold. Content null is an answer of no words (the protocol's way of
    saying that a model refused, or spent its tokens on thoughts), and so is "". Of content in parts the text is joined, thoughts left out.
    """
    choices = getattr(reply, "choices", None)
    if getattr(reply, "error", None) or not isinstance(choices, list) or not choices or getattr(choices[0], "error", None):
        return None
    message = getattr(choices[0], "message", None)
    if "content" not in getattr(message, "model_fields_set", ()):
        return None
    content = message.content  # type: ignore[union-attr]
    if content is None or isinstance(content, str):
        return content or ""
    return _joined(content) if isinstance(content, list) else None


def _joined(parts: list[Any]) -> str | None:
    said = [part for part in parts if not (isinstance(part, dict) and part.get("type") in _THOUGHTS)]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None for part in said]
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known) if parts and len(known) == len(texts) else None


def tokens_of(reply: Any) -> tuple[int, int] | None:
    """(prompt tokens, completion tokens) as the reply tells them; None where either is no whole number."""
    usage = getattr(reply, "usage", None)
    counts = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    return counts if all(type(count) is int and count >= 0 for count in counts) else None  # type: ignore[return-value]


FIRST, SECOND, TIE = "first", "second", "tie"
_WORDS = {"a": FIRST, "b": SECOND, "tie": TIE}


def parse(answer: str) -> str | None:
    """FIRST, SECOND or TIE for A, B and tie, in any case and with quotes, brackets, asterisks or a full stop around; None for all else.

    A block <think>…</think> before the answer is left out.
    """
    shown = re.sub(r"\A\s*<think>.*?</think>", "", answer, flags=re.DOTALL)
    return _WORDS.get(shown.strip(" \t\r\n*_\"'`[]().").lower())
