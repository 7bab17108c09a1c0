"""The tokenizer of a folder, and what a model takes over from another one."""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jaxrlhf.data.chat import checked_template, eos_ids_of
from jaxrlhf.data.tokens import tokenizer_fingerprint
from jaxrlhf.files import DamagedFile
from jaxrlhf.models.hub.loaded import Loaded, stated_eos_ids
from jaxrlhf.models.hub.safetensors import COPY, read_json, write_json
from jaxrlhf.models.settings import check_values, described_by

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
# Classes of transformers that read tokenizer.json as it stands; others rebuild parts of it by what their name says.
_AS_IT_STANDS = ("TokenizersBackend", "PreTrainedTokenizerFast")
SAVED_IDS = "tokenizer_ids.json"  # texts, and the ids they had when the tokenizer was saved
_PROBE = "Human: it's 1234,\n\n  don't  you\tthink? Ünïcödé 日本 🙂 x=[0];"
_PROBE_WORDS = 500


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, or None where it has no tokenizer files. Never runs code from the folder.

    A folder with tokenizer.json alone does not say which token ends a text; config.json does, and is asked. ValueError where a folder that
    `save_tokenizer` wrote gives other ids now, and where a chat template is no Jinja.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = folder / "tokenizer_config.json"
    with described_by(path):
        stated = read_json(path) if path.is_file() else {}
        check_values(stated)
    # AutoTokenizer would take the class of config.json's family instead (Qwen2's, with a pre-tokenizer of its own).
    plain = stated.get("tokenizer_class") in _AS_IT_STANDS and (folder / "tokenizer.json").is_file()
    reader = PreTrainedTokenizerFast if plain else AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # a panic of the library of tokenizers is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        there = ", ".join(name for name in _TOKENIZER_FILES if (folder / name).exists())
        raise DamagedFile(folder, f"has a tokenizer that cannot be read from {there} ({type(error).__name__}: {error})", COPY) from error
    if tokenizer.eos_token is None and (folder / "config.json").is_file():
        stated = read_json(folder / "config.json").get("eos_token_id")
        first = stated[0] if isinstance(stated, list) and stated else stated
        if isinstance(first, int) and 0 <= first < len(tokenizer):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    own = folder / "chat_template.jinja"  # else it is a key of the config, or several by name are
    where = own if own.is_file() else f"chat_template of {folder / 'tokenizer_config.json'}"
    template = tokenizer.chat_template or {}
    for one in template.values() if isinstance(template, dict) else (template,):
        checked_template(one, str(where))
    for text, ids in (read_json(folder / SAVED_IDS) if (folder / SAVED_IDS).is_file() else {}).items():
        if (found := _ids(tokenizer, text)) != ids:
            raise ValueError(
                f"the tokenizer in {folder} gives other ids than the one that was saved there: {text[:40]!r} is now {found[:10]} and was "
                f"{ascii(ids)[:60]}; was it replaced, or read by another version of transformers? Remove {SAVED_IDS} to take it as it is."
            )
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer and what it makes of a few texts, which `read_tokenizer` holds every reading to, this first one included.

    Where a model's config.json is there already and makes transformers read it otherwise, that is said on standard error.
    """
    tokenizer.save_pretrained(str(folder))
    ids = range(0, len(tokenizer), -(-len(tokenizer) // _PROBE_WORDS))
    texts = (_PROBE, " ".join(tokenizer.decode([i]) for i in ids))
    said = {text: _ids(tokenizer, text) for text in texts}
    write_json(said, folder / SAVED_IDS)
    read_tokenizer(folder)
    if (folder / "config.json").is_file():
        from transformers import AutoTokenizer

        other = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if any(_ids(other, text) != ids for text, ids in said.items()):
            _say_read_otherwise(read_json(folder / "config.json").get("model_type"))


@cache
def _say_read_otherwise(family: str) -> None:
    """Once a process. No class that tokenizer_config.json could name is heeded for qwen2 (transformers 5)."""
    print(
        f"jaxrlhf: transformers' AutoTokenizer reads the tokenizer of these {family} folders in the family's own way and gives other ids; "
        "there open it by PreTrainedTokenizerFast.from_pretrained(folder). This package does.",
        file=sys.stderr,
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def with_tokenizer(loaded: Loaded, tokenizer: Any) -> Loaded:
    """The model with this tokenizer: where it is another, the model's EOS, BOS and PAD ids become the tokenizer's.

    Of the model's own EOS ids those stay that are the same token in both; another may be an ordinary word by now, at which a sampler would
    stop. ValueError where the tokenizer has ids beyond the embedding.
    """
    check_vocabulary(tokenizer, loaded.params["backbone"]["embed"]["embedding"].shape[0])
    before, hf = loaded.tokenizer, dict(loaded.config.hf)
    if before is not None and tokenizer_fingerprint(before) == tokenizer_fingerprint(tokenizer):
        return loaded._replace(tokenizer=tokenizer)
    same = [i for i in stated_eos_ids(loaded.config) if before is not None and _token(before, i) == _token(tokenizer, i) is not None]
    ends = list(dict.fromkeys([*same, *eos_ids_of(tokenizer)]))
    ids = {
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    generation = {name: ids.get(name, value) for name, value in loaded.config.generation.items()}
    return loaded._replace(tokenizer=tokenizer, config=replace(loaded.config, hf={**hf, **ids}, generation=generation))


def _token(tokenizer: Any, i: int) -> str | None:
    return tokenizer.convert_ids_to_tokens(i) if 0 <= i < len(tokenizer) else None


def check_vocabulary(tokenizer: Any, rows: int) -> None:
    """ValueError unless every id of the tokenizer has a row in the embedding."""
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids but the model's embedding only {rows} rows; "
            "name the model's own tokenizer, or one that is no larger, in tokenizer.source."
        )
