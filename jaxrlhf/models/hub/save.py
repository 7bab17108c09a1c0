"""Write a folder that `transformers` and `load` open: safetensors, config, tokenizer."""

import copy
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.files import finished_folder
from jaxrlhf.models.hub.loaded import Loaded, eos_ids, head_of, reward_bias
from jaxrlhf.models.hub.safetensors import MAX_SHARD_BYTES, Tensor, check_finite, shards_of, write_json, write_shards
from jaxrlhf.models.hub.tensor_names import CLASSES, EMBEDDING, Entry, layout, leaf
from jaxrlhf.models.hub.tokenizer import save_tokenizer
from jaxrlhf.models.lora import merged
from jaxrlhf.types import Params

# What config.json says about a classification head; a language model saved from it says nothing of the kind.
_SCORE_FIELDS = ("reward_bias", "id2label", "label2id", "num_labels", "problem_type")
PAD_TOKEN = "<|pad|>"


def save(loaded: Loaded, folder: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a folder that `transformers` and `load` open: float32 safetensors, config, tokenizer.

    A scalar head becomes `…ForSequenceClassification` with one label and a pad token that is not EOS, because transformers finds the
    last token by it: the tokenizer's own, else a spare row of the vocabulary, else one appended row. All fields of the config that was
    read are kept. The folder appears whole or not at all; one of the same name is replaced. Tensors are merged with their adapters where
    there are any (models/lora.py), gathered, written and forgotten one by one. Of several processes all call this, because gathering is
    collective; the first one writes. ValueError, and no folder, where a tensor holds NaN or infinity.
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
            save_tokenizer(tokenizer, work)
        write_shards(shards, work)


def _tensor(entry: Entry, params: Params, more_rows: int) -> Tensor:
    """One tensor of the file, adapters merged into it; the embedding gets `more_rows` (0 or 1) rows that are the mean of the others."""
    leaves = [leaf(params, path) for path in entry.paths]
    shape = entry.shape([part.shape for part in leaves])
    grows = more_rows > 0 and entry.paths[0] == EMBEDDING

    def make() -> np.ndarray:
        made = entry.fuse(tuple(sharding.gather(_merged_leaf(params, path)) for path in entry.paths))
        check_finite(made, entry.name, "the model has diverged and is not written; lower the learning rate of what trained it")
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
