"""Hugging Face folder ↔ (model, parameters, tokenizer, config): safetensors only, in both directions."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.data.chat import chat_end_id, eos_ids_of
from jaxrlhf.data.tokens import tokenizer_fingerprint
from jaxrlhf.models.families import config_from_hf
from jaxrlhf.models.files import MAX_SHARD_BYTES, Tensor, TensorReader, finished_folder, read_json, shards_of, write_json, write_shards
from jaxrlhf.models.heads import check_head, with_head
from jaxrlhf.models.lora import merged
from jaxrlhf.models.model import build_model
from jaxrlhf.models.names import CLASSES, SCORE, Entry, is_ignored, layout, leaf, lm_head_names, prefix_of
from jaxrlhf.models.reading import read_params
from jaxrlhf.models.transformer import DecoderConfig
from jaxrlhf.storage import copies, remote
from jaxrlhf.types import Model, Params

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
# What config.json says about a classification head; a language model saved from it says nothing of the kind.
_SCORE_FIELDS = ("reward_bias", "id2label", "label2id", "num_labels", "problem_type")
PAD_TOKEN = "<|pad|>"
_EMBEDDING = ("backbone", "embed", "embedding")
# The files of a model folder that anything here reads: what is fetched from the hub, and what a folder's identity consists of.
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


class Loaded(NamedTuple):
    """A model in use: its functions, parameters, tokenizer (None where the folder has none) and config."""

    model: Model
    params: Params
    tokenizer: Any
    config: DecoderConfig


def load(
    source: str | Path,
    *,
    head: str = "lm",
    key: Array | None = None,
    dtype: str | None = None,
    mesh: Any = None,
    remat: str = "none",
    logits_chunk: int | None = None,
) -> Loaded:
    """Read a model from a Hugging Face folder, or from a hub id through its cache.

    `head="scalar"` reads a reward model's head, and on a language model puts a new random one, which needs `key`. `dtype` is that of
    the computation (default float32); parameters are always float32. `mesh` places them by the sharding table. `remat` and
    `logits_chunk` trade time for memory (`build_model`).

    ValueError: a family, setting or dtype that is not supported; tensors missing, unknown or of another shape; a new head without key.
    """
    check_head(head)
    folder = resolve(source)
    config = read_config(folder)
    params = _read_params(folder, config, head, key, mesh)
    how = {"remat": remat, "logits_chunk": logits_chunk} | sharding.row_constraints(mesh)
    model = build_model(config, head=head, dtype=dtype or "float32", **how)
    return Loaded(model, params, read_tokenizer(folder), config)


def read_config(folder: Path) -> DecoderConfig:
    """What a model folder says of its model, without its parameters. ValueError for what is not supported."""
    generation = folder / "generation_config.json"
    return config_from_hf(read_json(folder / "config.json"), read_json(generation) if generation.is_file() else None)


def initialise(
    config: DecoderConfig,
    *,
    key: Array,
    tokenizer: Any = None,
    head: str = "lm",
    dtype: str | None = None,
    mesh: Any = None,
    remat: str = "none",
    logits_chunk: int | None = None,
) -> Loaded:
    """A model from scratch, with random parameters; the other arguments as `load` takes them."""
    how = {"remat": remat, "logits_chunk": logits_chunk} | sharding.row_constraints(mesh)
    model = build_model(config, head=head, dtype=dtype or "float32", **how)
    return Loaded(model, sharding.init_on_mesh(model.init, mesh, key), tokenizer, config)


def rehead(loaded: Loaded, *, head: str, key: Array | None = None, dtype: str | None = None) -> Loaded:
    """The same backbone (its arrays shared) under a new head: how a reward model starts from a language model."""
    params = with_head(loaded.params, key, loaded.config, head)
    return loaded._replace(model=build_model(loaded.config, head=head, dtype=dtype or "float32"), params=params)


def resolve(source: str | Path) -> Path:
    """A local folder as it is, one at a URL as the copy of it here; anything else is a hub id, fetched into or found in the hub's cache."""
    if remote.is_url(source):
        return copies.cached_folder(source)
    folder = remote.as_path(source).expanduser()
    if (folder / "config.json").is_file():
        return folder
    text = str(source)
    if folder.exists() or text.startswith(("/", "./", "../", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"{source} is not a model folder: it has no config.json.")
    return _snapshot(text)


@lru_cache(maxsize=64)
def _snapshot(name: str) -> Path:
    """The hub is asked once a process: a run that lasts for days sees one revision."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:
        raise FileNotFoundError(f"{name} is neither a local folder nor a hub id that can be reached: {error}") from error


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


def head_of(params: Params) -> str:
    """ "scalar" or "lm", from the shape of the parameters."""
    return "scalar" if "head" in params and params["head"]["kernel"].shape[-1] == 1 else "lm"


def eos_ids(loaded: Loaded) -> tuple[int, ...]:
    """Every id that ends a response: of generation_config.json, config.json, the tokenizer and its chat template, in this order, each once.

    Whatever ends a response in the data (`data.chat.eos_ids_of`) is among them, so that a sampler stops where training said stop. A base
    model may know its chat template's end token from there alone.
    """
    tokenizer = loaded.tokenizer
    of_tokenizer = () if tokenizer is None else (tokenizer.eos_token_id, chat_end_id(tokenizer))
    return tuple(dict.fromkeys([*_stated_eos_ids(loaded.config), *(i for i in of_tokenizer if i is not None)]))


def _stated_eos_ids(config: DecoderConfig) -> list[int]:
    """The EOS ids of generation_config.json, then of config.json: each one number, several or none."""
    given = (config.generation.get("eos_token_id"), config.hf.get("eos_token_id"))
    return [i for value in given if value is not None for i in (value if isinstance(value, list | tuple) else [value])]


def with_tokenizer(loaded: Loaded, tokenizer: Any) -> Loaded:
    """The model with this tokenizer: where it is another, the model's EOS, BOS and PAD ids become the tokenizer's.

    Of the model's own EOS ids those stay that are the same token in both; another may be an ordinary word by now, at which a sampler would
    stop. ValueError where the tokenizer has ids beyond the embedding.
    """
    check_vocabulary(tokenizer, loaded.params["backbone"]["embed"]["embedding"].shape[0])
    before, hf = loaded.tokenizer, dict(loaded.config.hf)
    if before is not None and tokenizer_fingerprint(before) == tokenizer_fingerprint(tokenizer):
        return loaded._replace(tokenizer=tokenizer)
    same = [i for i in _stated_eos_ids(loaded.config) if before is not None and _token(before, i) == _token(tokenizer, i) is not None]
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


def reward_bias(loaded: Loaded) -> float:
    """The mean score of reference responses: score = scalar − reward_bias. 0 where none was set."""
    return float(loaded.config.hf.get("reward_bias", 0.0))


def with_reward_bias(loaded: Loaded, bias: float) -> Loaded:
    return loaded._replace(config=replace(loaded.config, hf={**loaded.config.hf, "reward_bias": float(bias)}))


def _read_params(folder: Path, config: DecoderConfig, head: str, key: Array | None, mesh: Any) -> Params:
    """The parameter tree from a folder's tensors, float32, on the mesh."""
    read = TensorReader(folder)
    prefix = prefix_of(config)
    # Some files hold the bare backbone, without the family's prefix.
    bare = not any(name.startswith(prefix) for name in read.files)
    heads = (SCORE, *lm_head_names(config))
    stored = {prefix + name if bare and name not in heads else name: name for name in read.files}
    if head == "lm" and not config.tied_head:
        first, *others = lm_head_names(config)
        for other in others:
            if other in stored:
                stored[first] = stored.pop(other)

    entries = layout(config, head)
    new_head = "head" in {path[0] for entry in entries for path in entry.paths} and entries[-1].name not in stored
    if new_head:
        entries = entries[:-1]
        if key is None:
            raise ValueError(f"{folder} has no {head!r} head; a new one is random, pass key= to load it with one.")
    _check_names(folder, {entry.name for entry in entries}, stored, config, head)
    # Shapes of the model that the config describes, without computing anything.
    wanted = jax.eval_shape(build_model(config, head=head).init, jax.random.key(0))
    params = read_params(read, entries, stored, wanted, mesh)
    if not new_head:
        return params
    made = with_head(params, key, config, head)["head"]
    return {**params, **sharding.place({"head": jax.device_get(made)}, mesh)}


def _check_names(folder: Path, wanted: set[str], stored: dict[str, str], config: DecoderConfig, head: str) -> None:
    missing = sorted(wanted - stored.keys())
    unknown = sorted(name for name in stored.keys() - wanted if not is_ignored(name, config, head))
    if missing or unknown:
        parts = [f"{label} {', '.join(names)}" for label, names in (("missing:", missing), ("unknown:", unknown)) if names]
        raise ValueError(
            f"the tensors in {folder} are not those of the {config.family} model its config.json describes; {'; '.join(parts)}."
        )


def save(loaded: Loaded, folder: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a folder that `transformers` and `load` open: float32 safetensors, config, tokenizer.

    A scalar head becomes `…ForSequenceClassification` with one label and a pad token that is not EOS, because transformers finds the
    last token by it: the tokenizer's own, else a spare row of the vocabulary, else one appended row. All fields of the config that was
    read are kept. The folder appears whole or not at all; one of the same name is replaced. Tensors are merged with their adapters where
    there are any (models/lora.py), gathered, written and forgotten one by one. Of several processes all call this, because gathering is
    collective; the first one writes.
    """
    folder = Path(folder)
    params, config, tokenizer = loaded.params, loaded.config, loaded.tokenizer
    head, more_rows = head_of(params), 0
    hf = {name: value for name, value in config.hf.items() if head == "scalar" or name not in _SCORE_FIELDS}
    hf |= {"model_type": config.family, "dtype": "float32"} | ({"torch_dtype": "float32"} if "torch_dtype" in hf else {})
    if head == "scalar":
        hf |= {"architectures": [f"{CLASSES[config.family]}ForSequenceClassification"], "reward_bias": reward_bias(loaded)}
        hf |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        rows = params["backbone"]["embed"]["embedding"].shape[0]
        tokenizer, hf["pad_token_id"] = _with_pad(loaded, rows)
        more_rows = int(hf["pad_token_id"] == rows)
        hf["vocab_size"] = rows + more_rows
    else:
        hf["architectures"] = [f"{CLASSES[config.family]}ForCausalLM"]
    shards = shards_of((_tensor(entry, params, more_rows) for entry in layout(config, head)), max_shard_bytes)
    if jax.process_index() != 0:
        for tensor in (tensor for shard in shards for tensor in shard):
            tensor.make()
        return
    with finished_folder(folder) as work:
        write_json(hf, work / "config.json")
        if config.generation:
            write_json(dict(config.generation), work / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(work))
        write_shards(shards, work)


def _tensor(entry: Entry, params: Params, more_rows: int) -> Tensor:
    """One tensor of the file, adapters merged into it; the embedding gets `more_rows` (0 or 1) rows that are the mean of the others."""
    leaves = [leaf(params, path) for path in entry.paths]
    shape = entry.shape([part.shape for part in leaves])
    grows = more_rows > 0 and entry.paths[0] == _EMBEDDING

    def make() -> np.ndarray:
        made = entry.fuse(tuple(sharding.gather(_merged_leaf(params, path)) for path in entry.paths))
        return np.concatenate([made, made.mean(axis=0, keepdims=True)]) if grows else made

    return Tensor(entry.name, (shape[0] + more_rows, *shape[1:]) if grows else shape, np.dtype(leaves[0].dtype), make)


def _merged_leaf(params: Params, path: tuple[str, ...]) -> Array:
    """A leaf of an ordinary model: of an adapted kernel, what it and its adapter come to."""
    around = leaf(params, path[:-1])
    return merged(around)["kernel"] if path[-1] == "kernel" and "lora_a" in around else around[path[-1]]


def _with_pad(loaded: Loaded, rows: int) -> tuple[Any, int]:
    """Tokenizer and pad id of a reward model whose padding cannot be taken for the end of a text; the id `rows` asks for one row more."""
    tokenizer = loaded.tokenizer
    text_ids = {*eos_ids(loaded), loaded.config.hf.get("bos_token_id")}
    if tokenizer is None:
        pad = loaded.config.hf.get("pad_token_id")
        pad = rows if pad is None or pad in text_ids else pad
    else:
        text_ids |= {tokenizer.bos_token_id, tokenizer.unk_token_id}
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id in text_ids:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        pad = tokenizer.pad_token_id
    if pad > rows:
        raise ValueError(f"the tokenizer's pad id {pad} lies beyond the {rows} rows of the embedding; its vocabulary is not this model's.")
    return tokenizer, pad
