"""Model folders that somebody has broken or wants to do harm with, one a number: what `make faults` and its short form read.

bases(folder)                       name → a good folder, small, of every reader
attack(bases, folder, number)       spoil a copy of one of them and read it: AssertionError where that ends otherwise than it may
"""

import faulthandler
import json
import os
import random
import shutil
import struct
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tiny_encoder import write_tiny_bert

from jaxrlhf import cli, rng
from jaxrlhf.data.tokenizer import train_tokenizer
from jaxrlhf.models import hub
from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.hub.encoder import load_classifier, load_encoder
from jaxrlhf.models.hub.identity import folder_identity
from jaxrlhf.offline.encoder_identity import encoder_identity

DEEP = "[" * 50_000
VALUES = (None, True, "x", "", -1, 0, 7, 10**9, 2**63, 10**400, 1.5, float("nan"), float("inf"), [], {}, [[]], {"a": {}},
          "../../../etc/passwd", "\ud800", "\0\x1b[31m\n", ["x", 1], -(10**9))  # fmt: skip
CODE = "import pathlib\npathlib.Path({marker!r}).touch()\n"


def bases(folder: Path) -> dict[str, Path]:
    tokenizer = train_tokenizer(["a few words, and some more words"], 300)
    made = {}
    for family, head in (("llama", "lm"), ("llama", "scalar"), ("gpt2", "lm"), ("gpt_neox", "lm")):
        shape = {"family": family, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}
        config, _ = config_from_shape(shape, 512, max_positions=32, pad_id=0, eos_id=1)
        made[f"{family}-{head}"] = folder / f"{family}-{head}"
        hub.save(hub.initialise(config, key=rng.root_key(0), tokenizer=tokenizer, head=head), made[f"{family}-{head}"])
    made["encoder"] = write_tiny_bert(folder / "encoder", ["good"])
    made["classifier"] = write_tiny_bert(folder / "classifier", ["good"], classifier=True)
    return made


def attack(bases: dict[str, Path], scratch: Path, number: int) -> str:
    """What was done and how it ended."""
    name = list(bases)[number // 8 % len(bases)]
    folder, marker = scratch / f"folder-{number}", scratch / f"executed-{number}"
    shutil.copytree(bases[name], folder)
    what, must_fail = spoil(folder, number, marker)
    what, started, message = f"{name}, {what}", time.process_time(), ""
    faulthandler.dump_traceback_later(60, exit=True)  # a pipe that is opened would wait for ever
    try:
        read(name, folder)
    except BaseException as error:
        assert cli._is_plain(error), f"{what}: {type(error).__name__}"  # type: ignore[arg-type]
        message = str(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.process_time() - started < 5, what  # by this process's clock: the machine may do other work
    assert not marker.exists(), f"{what}: code of the folder was executed"
    assert message or not must_fail, f"{what}: read without a word"
    assert not message or (str(folder) in message and message.isprintable()), f"{what}: {message!a}"
    shutil.rmtree(folder)
    return f"{what}: {message or 'read'}"


def read(base: str, folder: Path):
    """The parameters, as every command that takes such a folder reads it."""
    if base == "encoder":
        encoder_identity(folder, backend="flax")
        return load_encoder(folder).params
    if base == "classifier":
        return load_classifier(folder).params
    head = base.rsplit("-", 1)[1]
    folder_identity(str(folder))
    hub.check_weights(folder, head=head)
    loaded = hub.load(folder, head=head)
    hub.eos_ids(loaded)
    return loaded.params


def spoil(folder: Path, number: int, marker: Path) -> tuple[str, bool]:
    """Do something to a folder: what, and whether it must not be read afterwards. `marker` is what code of the folder would make."""
    chance = random.Random(number)
    ways = (_file, _value, _value, _value, _tensors, _tensors, _index, _code)
    return ways[number % len(ways)](folder, chance, marker)


def _files(folder: Path, suffix: str = "") -> list[Path]:
    return sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())


def _file(folder: Path, chance: random.Random, marker: Path) -> tuple[str, bool]:
    path = chance.choice([*_files(folder), folder / "config.json", folder / "model.safetensors", folder / "tokenizer.json"])
    content, how = path.read_bytes(), chance.choice(list(_WAYS))
    path.unlink()
    _WAYS[how](path, content, chance)
    needed = path.name in ("config.json", "model.safetensors") and path.parent == folder
    return f"{path.name}: {how}", needed and how != "flipped"


_WAYS = {
    "missing": lambda path, content, chance: None,
    "empty": lambda path, content, chance: path.touch(),
    "cut": lambda path, content, chance: path.write_bytes(content[: len(content) // 2]),
    "flipped": lambda path, content, chance: path.write_bytes(_flipped(content, chance)),
    "garbage": lambda path, content, chance: path.write_bytes(chance.randbytes(len(content))),
    "zeros": lambda path, content, chance: path.write_bytes(bytes(len(content))),
    "a folder": lambda path, content, chance: path.mkdir(),
    "a pipe": lambda path, content, chance: os.mkfifo(path),
    "a device": lambda path, content, chance: path.symlink_to("/dev/zero"),
    "a loop": lambda path, content, chance: path.symlink_to(path.name),
    "a dead link": lambda path, content, chance: path.symlink_to("nowhere"),
    "UTF-16": lambda path, content, chance: path.write_bytes("{é}".encode("utf-16") * 99),
    "Latin-1": lambda path, content, chance: path.write_bytes(b'{"a": "\xe9"}'),
    "deep": lambda path, content, chance: path.write_text(DEEP),
    "a list": lambda path, content, chance: path.write_text("[1, 2]"),
    "5,000 digits": lambda path, content, chance: path.write_text(f'{{"hidden_size": {"9" * 5000}}}'),
}


def _flipped(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(3):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _value(folder: Path, chance: random.Random, marker: Path) -> tuple[str, bool]:
    """One value of one JSON file, wherever it stands, is another, or gone."""
    path = chance.choice([*_files(folder, ".json"), folder / "config.json", folder / "config.json"])
    body = json.loads(path.read_text(encoding="utf-8"))
    inner, place = body, chance.choice(list(range(len(body)) if isinstance(body, list) else body))
    while isinstance(inner[place], dict | list) and inner[place] and chance.random() < 0.7:
        inner = inner[place]
        place = chance.choice(list(range(len(inner)) if isinstance(inner, list) else inner))
    value = chance.choice((*VALUES, "gone"))
    if value == "gone":
        del inner[place]
    else:
        inner[place] = value
    path.write_text(json.dumps(body), encoding="utf-8")
    return f"{path.name}: {place} = {str(value)[:30]!a}", False


def _tensors(folder: Path, chance: random.Random, marker: Path) -> tuple[str, bool]:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = chance.choice([one for one in header if one != "__metadata__"])
    entry = header[name]
    how = chance.choice(list(_HEADERS))
    if how == "NaN":
        tensors = load_file(path)
        tensors[name] = np.where(np.arange(tensors[name].size).reshape(tensors[name].shape) == 0, np.nan, tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})
        return f"model.safetensors: NaN in {name}", True
    if how == "length":
        said = chance.choice((0, 1, length - 1, length + 1, len(content), 2**31, 2**63 - 1, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", said) + content[8:])
        return f"model.safetensors: header length {said}", True
    _HEADERS[how](header, name, entry, chance)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return f"model.safetensors: {how} of {name}", True


_HEADERS = {
    "NaN": None,
    "length": None,
    "dtype": lambda header, name, entry, chance: entry.update(
        dtype=chance.choice(("I64", "U8", "BOOL", "F8_E4M3", "X", "", None, 3, "F64"))
    ),
    "shape": lambda header, name, entry, chance: entry.update(
        shape=chance.choice(([], [0], [1, 2, 3], [2**40], [2**63, 2], [-1], ["a"], None, 5, [1e300]))
    ),
    "offsets": lambda header, name, entry, chance: entry.update(
        data_offsets=chance.choice(([-1, 4], [0, 2**62], [9, 3], [1, 2, 3], None, "x", [2**64, 2**65], [0, 1]))
    ),
    "overlap": lambda header, name, entry, chance: [
        one.update(data_offsets=entry["data_offsets"]) for n, one in header.items() if n[0] != "_"
    ],
    "renamed": lambda header, name, entry, chance: header.update({chance.choice(("x\n\x1b[31m", "", "../x", "\ud800")): header.pop(name)}),
    "entry": lambda header, name, entry, chance: header.update({name: chance.choice((None, [], 3, "x", {}))}),
}


def _index(folder: Path, chance: random.Random, marker: Path) -> tuple[str, bool]:
    path = folder / "model.safetensors"
    names = list(load_file(path))
    maps = (
        None, [], "x", {}, {name: 3 for name in names}, {name: None for name in names}, {name: "nowhere.safetensors" for name in names},
        {name: str(folder / ".." / "model.safetensors") for name in names}, {name: "../other/model.safetensors" for name in names},
        {"more": "model.safetensors", **dict.fromkeys(names, "model.safetensors")}, {name: "config.json" for name in names},
        {name: "model\0.safetensors" for name in names}, {name: "." for name in names},
    )  # fmt: skip
    named = chance.choice(maps)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    return f"model.safetensors.index.json: {str(named)[:60]}", True


def _code(folder: Path, chance: random.Random, marker: Path) -> tuple[str, bool]:
    """Code and pickles beside the model; without safetensors there is nothing else to read."""
    code = CODE.format(marker=str(marker))
    for name in ("modeling_evil", "tokenization_evil", "configuration_evil", "setup", "__init__", "conftest", "sitecustomize"):
        (folder / f"{name}.py").write_text(code)
    pickled = f"cpathlib\nPath\n(V{marker}\ntRp0\n0cbuiltins\nexec\n(V{code!a}\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pt", "model.pkl", "training_args.bin", "tokenizer.pkl"):
        (folder / name).write_bytes(pickled)
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer")
    targets = (
        "configuration_evil.Evil",
        "modeling_evil.Evil",
        "modeling_evil.Evil",
        "modeling_evil.Evil",
        ["tokenization_evil.Evil", None],
    )
    mapped = dict(zip(kinds, targets, strict=True))
    how = chance.choice(("beside", "auto_map", "model_type", "tokenizer_class", "without"))
    for name in ("config.json", "tokenizer_config.json"):
        body = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        body |= {"auto_map": mapped} if how != "beside" else {}
        body |= {"model_type": "evil"} if how == "model_type" else {}
        body |= {"tokenizer_class": "EvilTokenizer"} if how == "tokenizer_class" else {}
        (folder / name).write_text(json.dumps(body))
    if how == "without":
        (folder / "model.safetensors").unlink()
    return f"code, {how}", how in ("model_type", "without")
