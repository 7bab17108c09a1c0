"""The tokenizer of a folder, and what a model takes over from another one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxrlhf.data.chat import eos_ids_of
from jaxrlhf.data.tokens import tokenizer_fingerprint
from jaxrlhf.models.hub.loaded import Loaded, stated_eos_ids
from jaxrlhf.models.hub.safetensors import read_json

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, or None where it has no tokenizer files. Never runs code from the folder.

    A folder with tokenizer.json alone does not say which token ends a text; config.json does, and is asked.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token is None and (folder / "config.json").is_file():
        stated = read_json(folder / "config.json").get("eos_token_id")
        first = stated[0] if isinstance(stated, list) and stated else stated
        if isinstance(first, int) and 0 <= first < len(tokenizer):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    return tokenizer


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
