"""A model folder by the bytes of its files."""

import hashlib
import json
from pathlib import Path

from jaxrlhf.files import digests
from jaxrlhf.models.hub.load import FILES, resolve


def folder_identity(source: str, *, weights: bool = True) -> str:
    """A model or tokenizer folder (or hub id) by the bytes of its files, wherever it lies; without `weights` less its safetensors."""
    folder = Path(source).expanduser() if Path(source).expanduser().is_dir() else resolve(source)
    found = {file for pattern in FILES for file in folder.glob(pattern) if file.is_file() and (weights or file.suffix != ".safetensors")}
    files = sorted(found, key=lambda file: file.name)
    content = [(file.name, digest.hex()) for file, digest in zip(files, digests(files), strict=True)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]
