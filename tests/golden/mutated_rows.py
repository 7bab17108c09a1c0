"""Data files that nobody should have written, one a number: what `make faults` and its short form read.

attack(folder, number, tokenizer)     write a file of rows of our schemas, spoil it (values, bytes, the file), and read it:
                                      AssertionError where a row is gone without a word
"""

import datetime
import decimal
import gzip
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxrlhf.data import tokens
from jaxrlhf.data.pairs import DataError, read_demonstrations, read_pairs, read_prompts
from jaxrlhf.data.stored_responses import read_generations
from jaxrlhf.data.tokenizer import train_tokenizer

ROWS = 25  # of a file
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
OTHER = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]
GOOD = (
    {"prompt": "p", "chosen": " c", "rejected": " r", "margin": 0.5, "id": "x"},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"prompt": "p", "completion": "c", "label": True},
    {"prompt": "p", "response": "c", "templated": True, "finished": False},
    {"messages": TALK, "tools": "[]", "chat_template_kwargs": {"x": 1}},
    {"chosen": TALK, "rejected": OTHER},
    {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": OTHER[1:]},
    {"prompt": TALK[:1], "completion": TALK[1:]},
    {"text": "t"},
    {"prompt": "p"},
)
VALUES = (
    None, True, False, 0, -1, 7, 10**400, 1e39, 1.5, float("nan"), float("inf"), "", " ", "\0", "\ud800", "\r\n",
    "\u2028\u2029\x85", "\ufeff", "</s>", "<|im_end|>", "<|endoftext|>" * 300, "日本語🙂", "e\u0301" * 50, "\u202e", "{}", "%s",
    "{{ 7 * 7 }}", "x" * 100_000, [], {}, [None],
    [[]], {"role": None}, [{"role": "user"}], [{"content": "x", "role": 3}], {"a": {"a": {"a": None}}}, TALK, [*TALK, *TALK], ["x", 1],
)  # fmt: skip
FIELDS = ("prompt", "chosen", "rejected", "completion", "response", "messages", "text", "id", "margin", "label", "tools", "role", "content",
          "chat_template_kwargs", "templated", "response_1", "completions", "labels", "\0", "")  # fmt: skip


def chat_tokenizer():
    tokenizer = train_tokenizer(["hello"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def attack(folder: Path, number: int, tokenizer) -> tuple[int, int]:
    """(rows kept, rows dropped)."""
    path, rows = write(folder, number)
    counts = account(path, rows, number, tokenizer)
    path.unlink()
    return counts


def mutated(value, chance, depth=0):
    """The row, or something else somewhere in it."""
    how = chance.random()
    if depth and (how < 0.3 or not isinstance(value, dict | list) or not value):
        return chance.choice(VALUES)
    if isinstance(value, list):
        place = chance.randrange(len(value))
        return [mutated(one, chance, depth + 1) if n == place else one for n, one in enumerate(value)]
    name = chance.choice([*value, *value, chance.choice(FIELDS)])
    if how < 0.5 and name in value and depth + len(value) > 1:
        return {one: inner for one, inner in value.items() if one != name}
    return value | {name: mutated(value.get(name), chance, depth + 1)}


def row(chance):
    found = dict(chance.choice(GOOD))
    for _ in range(chance.choice((0, 0, 1, 1, 2, 3))):
        found = mutated(found, chance)
    return found


def write(folder: Path, number: int) -> tuple[Path, int | None]:
    """(the file, how many rows it has; None where what is left of it decides)."""
    chance = random.Random(number)
    kind = chance.choice(("jsonl", "jsonl", "jsonl", "jsonl.gz", "json", "json.gz", "parquet", "parquet"))
    path = folder / f"{number}.{kind}"
    if kind == "parquet":
        return path, _parquet(path, chance)
    rows = [row(chance) for _ in range(ROWS)]
    if kind.startswith("jsonl"):
        content = b"".join(_line(one, chance) for one in rows)
        if chance.random() < 0.2:
            content = b"\xef\xbb\xbf" + content
    else:
        content = json.dumps(rows, indent=chance.choice((None, 1))).encode()
        if chance.random() < 0.3:
            content = chance.choice(
                (b"[" * 90_000, content[:-1], content + b"]", b"[]", b'[1, null, "x"]', content.decode().encode("utf-16"))
            )
    lines = sum(bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")) if kind.startswith("jsonl") else None
    if kind.endswith("gz"):
        content = gzip.compress(content)
    damaged = chance.random() < 0.2
    if damaged:
        content = chance.choice((content[: chance.randrange(len(content))], _flipped(content, chance), b"\x1f\x8b" + content, b""))
    path.write_bytes(content)
    return path, None if damaged else lines


def _line(one, chance) -> bytes:
    """A row as JSON, mostly; its bytes may be others."""
    line = json.dumps(one, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    how = chance.random()
    if how < 0.1:
        line = _flipped(line, chance)
    elif how < 0.2:
        line = chance.choice(
            (line[: chance.randrange(len(line))], b"", b"\0" * 40, line + line, b"\xff" + line,
             line.decode(errors="replace").encode("utf-16"), b"{" * 30_000, b"[" * 30_000, b'{"prompt": NaN}', b"null", b'"x"',
             b'{"prompt": "a", "prompt": "b"}',
             b'{"id": ' + b"9" * 5000 + b"}")
        )  # fmt: skip
    return line + chance.choice((b"\n", b"\n", b"\n", b"\r\n"))


def _flipped(content: bytes, chance) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _parquet(path: Path, chance) -> int | None:
    names = chance.sample(FIELDS, chance.randint(1, 5))
    arrays = []
    for name in names:
        make = chance.choice(_COLUMNS if chance.random() < 0.5 else _COLUMNS[:2])
        arrays.append(make([dict(chance.choice(GOOD)).get(name) for _ in range(ROWS)], chance))
    table = pa.Table.from_arrays(arrays, names=[*names[:-1], chance.choice((*names[:-1], *names[-1:] * 5))])
    pq.write_table(table, path, row_group_size=chance.choice((1, 7, 100)))
    if chance.random() < 0.3:
        content = path.read_bytes()
        path.write_bytes(
            chance.choice((content[: chance.randrange(len(content))], _flipped(content, chance), b"", b"PAR1", content + b"x"))
        )
        return None
    return ROWS


def _typed(kind, *values):
    return lambda given, chance: pa.array([chance.choice((None, *values)) for _ in given], kind)


_COLUMNS = (
    _typed(pa.string(), "p", " c", "", "\0", "x" * 50_000),
    _typed(pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), [], TALK, TALK[:1], [None], [{"role": "user"}]),
    _typed(pa.large_string(), "日本", "\u2028"),
    _typed(pa.int64(), 0, 2**62),
    _typed(pa.float32(), float("nan"), 1.0),
    _typed(pa.bool_(), True, False),
    _typed(pa.null()),
    _typed(pa.binary(), b"\xff\0", b"x"),
    _typed(pa.decimal128(9, 2), decimal.Decimal("1.50")),
    _typed(pa.timestamp("us"), datetime.datetime(2020, 1, 1)),
    _typed(pa.date32(), datetime.date(2020, 1, 1)),
    _typed(pa.time64("us"), datetime.time(1)),
    _typed(pa.duration("s"), datetime.timedelta(1)),
    _typed(pa.map_(pa.string(), pa.string()), [("a", None)], [("role", "user"), ("content", "x")]),
    _typed(pa.list_(pa.int32()), [1, 2]),
    _typed(pa.list_(pa.string(), 2), ["a", None]),
    _typed(pa.struct([("a", pa.struct([("b", pa.list_(pa.null()))]))]), {"a": None}, {"a": {"b": [None]}}),
    lambda given, chance: pa.array(["a", "b", None] * (len(given) // 3) + ["a"] * (len(given) % 3)).dictionary_encode(),
    lambda given, chance: pa.Array.from_buffers(pa.string(), len(given), pa.array([b"\xff\xfe"] * len(given), pa.binary()).buffers()),
)


def account(path: Path, rows: int | None, number: int, tokenizer) -> tuple[int, int]:
    """(kept, dropped). AssertionError where a row is gone without a word; whatever else reading raises that is no DataError."""
    chance = random.Random(-number)
    if chance.random() < 0.1:
        try:
            return len(read_generations(path)), 0
        except DataError as error:
            assert str(path) in str(error)
            return 0, rows or 0
    read = chance.choice((read_pairs, read_demonstrations, read_prompts))
    options = {"tokenizer": chance.choice((tokenizer, tokenizer, None)), "implicit_prompt": chance.choice(("assistant", "common_prefix"))}
    try:
        kept, report = read(path, **options)
    except DataError as error:
        said = re.search(r"0 rows kept, (\d+) dropped", str(error))
        assert str(path) in str(error)
        assert rows is None or said is None or int(said[1]) == rows, (rows, str(error)[:300])
        return 0, int(said[1]) if said else rows or 0
    assert len(kept) == report.kept and (rows is None or report.kept + len(report.dropped) == rows), (
        rows,
        report.kept,
        len(report.dropped),
    )
    assert all(where.startswith(str(path)) and reason for where, reason in report.dropped)
    encode = {
        read_pairs: tokens.tokenize_pairs,
        read_demonstrations: tokens.tokenize_demonstrations,
        read_prompts: tokens.tokenize_prompts,
    }[read]
    try:
        ends = {} if read is read_prompts else {"eos_ids": (1,)}
        _, encoded = encode(kept, tokenizer, tokens.Limits(16, 16), **ends)
        assert encoded.kept + len(encoded.dropped) == len(kept)
    except DataError:
        pass  # none fits
    return report.kept, len(report.dropped)
