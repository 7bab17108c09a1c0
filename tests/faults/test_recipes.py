"""500 recipes that are wrong in ways nobody thought of: bytes changed, values and keys replaced. No traceback, none over 5 s, none silent.

A recipe is what `jaxrlhf run RECIPE --dry_run` reads: it is refused with a message, or every value in it is one of the config's.
"""

import io
import random
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
import yaml

from jaxrlhf import cli
from jaxrlhf.recipe import all_keys, load_config, recipe_folder, to_mapping

TOY = ("quickstart.yaml", "methods_toy.yaml", "grid_toy_small.yaml", "grid_toy.yaml")  # nothing else is read
RECIPES, BATCH, SECONDS = 500, 50, 5.0
KEYS = sorted(all_keys())
VALUES = (
    "0", "-1", "1", "2", "7", "1.5", "1e-3", "1e400", ".nan", ".inf", "-.inf", "nan", "010", "1:30", "0x10", "1_000", "9" * 30, "9" * 5000,
    "true", "off", "~", "''", "' '", "..", "a/b", "stages", "é", "🙂", "'\\0'", '"\\0"', '"\\e[31m"', "toy", "ocrm", "a:b", "os:system",
    "[]", "{}", "[1, x]", "{a: 1}", "{a: 1, a: 2}", "*x", "&x 1", "!!python/name:os.system x", "!!binary aGk=", "2024-13-45", "|\n  text",
    "'toy'", "- 1", "\t1", "[" * 5000, "{x: " * 40 + "}" * 40,
)  # fmt: skip
BYTES = (
    b"\0", b"\t", b"\xff", b"\xc3", b"\xe2\x80\xa8", b"\x1b", b"\r", b"\n", b"\n\n", b":", b": ", b"- ", b"[", b"]", b"{", b"}", b"&a ",
    b"*a ", b"!", b"%", b"@", b"`", b"'", b'"', b"#", b",", b"|", b">", b"?", b"---\n", b"...\n", b"<<: ", b"\xef\xbb\xbf", b"9" * 40,
)  # fmt: skip


def mutated(chance: random.Random) -> bytes:
    """A recipe of the package with one to four faults."""
    content = (recipe_folder() / chance.choice(TOY)).read_bytes()
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        content = chance.choice((changed_bytes, changed_line, changed_line, added_key, added_key))(content, chance)
    if chance.random() < 0.03:
        content = content.decode("utf-8", "replace").encode(chance.choice(("utf-16", "latin-1")), "replace")
    return content


def changed_bytes(content: bytes, chance: random.Random) -> bytes:
    at, length = chance.randrange(len(content) + 1), chance.choice((0, 0, 1, 1, 2, 30, 500))
    put = chance.choice((b"", chance.choice(BYTES), bytes([chance.randrange(256)]), content[at : at + length] * 2))
    return content[:at] + put + content[at + length :]


def changed_line(content: bytes, chance: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = chance.randrange(len(lines))
    key, colon, _ = lines[at].partition(b":")
    new = chance.choice(
        (key + colon + b" " + chance.choice(VALUES).encode(), b"", lines[at] + b"\n" + lines[at], b" " + lines[at], lines[at][::-1])
    )
    return b"\n".join([*lines[:at], new, *lines[at + 1 :]])


def added_key(content: bytes, chance: random.Random) -> bytes:
    """A setting, or one misspelled, in its section, or as one of its own at the end."""
    *sections, name = chance.choice(KEYS).split(".")
    name = name[:-1] + "x" if chance.random() < 0.2 else name
    text = f"{name}: {chance.choice(VALUES)}"
    if len(sections) == 1 and (head := f"\n{sections[0]}:\n".encode()) in content:
        return content.replace(head, head + f"  {text}\n".encode(), 1)
    for section in reversed(sections):
        text = f"{section}:\n" + "\n".join(f"  {line}" for line in text.split("\n"))
    return content + b"\n" + text.encode() + b"\n"


@pytest.mark.parametrize("batch", range(RECIPES // BATCH))
def test_recipes(batch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["run", "quickstart.yaml", "--dry_run"])  # what is imported and compiled once
    refused, longest = 0, 0.0
    for number in range(batch * BATCH, (batch + 1) * BATCH):
        content = mutated(random.Random(number))
        (tmp_path / "recipe.yaml").write_bytes(content)
        said, started = io.StringIO(), time.process_time()
        with redirect_stderr(said), redirect_stdout(said):
            status = cli.main(["run", "recipe.yaml", "--dry_run"])  # an error that is not written for users is raised
        seconds = time.process_time() - started
        longest = max(longest, seconds)
        assert seconds < SECONDS, (number, seconds)
        assert status in (0, 1), number
        refused += status
        text = said.getvalue()
        assert "Traceback" not in text and "\x1b" not in text, (number, text)
        if status:
            assert text.startswith("jaxrlhf: ") and len(text) < 20_000 and max(map(len, text.splitlines())) < 2_000, (number, text)
        else:
            raw = yaml.load(content.decode("utf-8-sig"), getattr(yaml, "CBaseLoader", yaml.BaseLoader)) or {}
            assert silent(raw, to_mapping(load_config("recipe.yaml"))) == [], number
        assert {path.name for path in tmp_path.iterdir()} <= {"recipe.yaml"}, number
    print(f"batch {batch}: {refused} of {BATCH} refused, {BATCH - refused} mean what they say, at most {longest:.2f} s")
    assert refused > BATCH // 4


def silent(raw: object, found: object, place: str = "") -> list[str]:
    """The places where a recipe, its scalars read as text, says one thing and the config another."""
    if isinstance(raw, dict) and isinstance(found, dict):
        return [fault for key in raw.keys() - {"<<"} for fault in silent(raw[key], found.get(key, "nothing"), f"{place}.{key}")]
    if isinstance(raw, list) and isinstance(found, list) and len(raw) == len(found):
        return [fault for n, pair in enumerate(zip(raw, found, strict=True)) for fault in silent(*pair, f"{place}.{n}")]
    if isinstance(found, bool):
        return [] if str(raw).lower() in (("true", "on", "yes", "1") if found else ("false", "off", "no", "0")) else [f"{place}: {raw!r}"]
    return [] if meant(raw) == meant(found) else [f"{place}: {raw!r} became {found!r}"]


def meant(value: object) -> object:
    """A number for what is one, however it is written."""
    text = str(value).lower()
    if text in ("", "~", "null", "none"):
        return None
    try:
        return text if text == "nan" else float(text)
    except ValueError:
        return str(value)
