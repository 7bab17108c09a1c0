"""What a run reads, identified by content: equal identities, equal results."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

from jaxrlhf.config import Config, Sources
from jaxrlhf.data.sources import source_files
from jaxrlhf.files import digests
from jaxrlhf.models.hub.identity import folder_identity
from jaxrlhf.pipeline.inputs.rows import TOY
from jaxrlhf.plugins import source_of

OF_MEMORY = ("remat", "logits_chunk", "offload_frozen")  # of config.model, but nothing that a result depends on


def data_identity(config: Config) -> dict[str, Any]:
    """What the text of a run depends on, contents of files included: equal identities, equal rows."""
    data = config.data
    section = asdict(data)
    if data.train == TOY:
        counts = {"num_demonstrations": data.num_demonstrations, "num_prompts": data.num_prompts}
        return {"toy": section["toy"], **counts, "seed": config.text_seed}
    for name in ("train", "valid", "demonstrations", "prompts"):
        section[name] = [_content(source) for source in _several(section[name])]
    del section["toy"], section["num_demonstrations"], section["num_prompts"], section["limits"]
    return section | {"pairs": config.pairs.source, "seed": config.text_seed}


def _several(sources: Sources | None) -> tuple[str, ...]:
    return () if sources is None else (sources,) if isinstance(sources, str) else sources


def _content(source: str) -> str:
    """Files by their bytes, in the order they are read; a hub id by its name."""
    files = source_files(source)
    if files is None:
        return source
    return hashlib.sha256(b"".join(digests(files))).hexdigest()[:20]


def model_identity(config: Config) -> dict[str, Any]:
    """What the base model is: the content of its folder, or a shape; and the dtype it computes in."""
    section = {name: value for name, value in asdict(config.model).items() if name not in OF_MEMORY}
    return section | {"source": None if config.model.source is None else folder_identity(config.model.source)}


def tokenizer_identity(source: str | None) -> str | None:
    """The content of the folder that a tokenizer is read from, None where none is named."""
    return None if source is None else folder_identity(source, weights=False)


def gold_identity(config: Config) -> dict[str, Any]:
    """What gold's scores depend on: a function and its code, or the content of a folder."""
    gold = config.gold
    section, content = asdict(gold), None
    if gold.source and gold.kind == "function":
        content = source_of(gold.source)
    elif gold.source and gold.kind == "model":
        section["source"], content = None, folder_identity(gold.source)
    return section | {"content": content}
