"""Read a model from a Hugging Face folder or hub id, or make one from scratch. Safetensors only."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxrlhf import rng, sharding
from jaxrlhf.models.families import config_from_hf
from jaxrlhf.models.heads import check_head, with_head
from jaxrlhf.models.hub.loaded import Loaded
from jaxrlhf.models.hub.read_params import check_names, check_shapes, read_params
from jaxrlhf.models.hub.safetensors import TensorReader, read_json
from jaxrlhf.models.hub.tensor_names import EMBEDDING, SCORE, Entry, is_ignored, layout, lm_head_names, plain_name, prefix_of
from jaxrlhf.models.hub.tokenizer import read_tokenizer
from jaxrlhf.models.model import build_model
from jaxrlhf.models.settings import described_by
from jaxrlhf.models.transformer import DecoderConfig
from jaxrlhf.storage import copies, remote
from jaxrlhf.storage.record import check_stage
from jaxrlhf.types import Params

# The files of a model folder that anything here reads: what is fetched from the hub, and what a folder's identity consists of.
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def load(
    source: str | Path,
    *,
    head: str = "lm",
    key: Array | None = None,
    dtype: str | None = None,
    matmul_precision: str = "highest",
    mesh: Any = None,
    remat: str = "none",
    logits_chunk: int | None = None,
) -> Loaded:
    """Read a model from a Hugging Face folder, or from a hub id through its cache.

    `head="scalar"` reads a reward model's head, and on a language model puts a new random one, which needs `key`. `dtype` is that of
    the computation (default float32) and `matmul_precision` that of its products of float32 (`build_model`); parameters are always
    float32. `mesh` places them by the sharding table. `remat` and `logits_chunk` trade time for memory (`build_model`).

    ValueError: a family, setting or dtype that is not supported; tensors missing, unknown or of another shape; a new head without key.
    """
    rng.check_flags()
    check_head(head)
    folder = resolve(source)
    config = read_config(folder)
    params = _read_params(folder, config, head, key, mesh)
    how = {"matmul_precision": matmul_precision, "remat": remat, "logits_chunk": logits_chunk} | sharding.row_constraints(mesh)
    model = build_model(config, head=head, dtype=dtype or "float32", **how)
    return Loaded(model, params, read_tokenizer(folder), config)


def read_config(folder: Path) -> DecoderConfig:
    """What a model folder says of its model, without its parameters. ValueError for what is not supported."""
    path, generation = folder / "config.json", folder / "generation_config.json"
    with described_by(path):
        return config_from_hf(read_json(path), read_json(generation) if generation.exists() else None)


def classes_of(folder: Path) -> list[str]:
    """What config.json says the model is, such as LlamaForCausalLM; nothing where there is no config.json (`load` says that better)."""
    path = folder / "config.json"
    with described_by(path):
        stated = (read_json(path) if path.is_file() else {}).get("architectures") or []
        return [one for one in stated if isinstance(one, str)]


def initialise(
    config: DecoderConfig, *, key: Array, tokenizer: Any = None, head: str = "lm", dtype: str | None = None, mesh: Any = None, **how: Any
) -> Loaded:
    """A model from scratch, with random parameters; the other arguments as `load` takes them."""
    model = build_model(config, head=head, dtype=dtype or "float32", **how, **sharding.row_constraints(mesh))
    return Loaded(model, sharding.init_on_mesh(model.init, mesh, key), tokenizer, config)


def rehead(loaded: Loaded, *, head: str, key: Array | None = None) -> Loaded:
    """The same backbone (its arrays shared) under a new head: how a reward model starts from a language model."""
    params = with_head(loaded.params, key, loaded.config, head)
    return loaded._replace(model=build_model(loaded.config, head=head), params=params)


def resolve(source: str | Path) -> Path:
    """A local folder as it is, one at a URL as the copy of it here; anything else is a hub id, fetched into or found in the hub's cache.

    Raises StageError for the folder of a finished stage of which a file is damaged.
    """
    if remote.is_url(source):
        return copies.cached_folder(source)
    folder = remote.as_path(source).expanduser()
    if (folder / "config.json").is_file():
        check_stage(folder)
        return folder
    text = str(source)
    if folder.exists() or text.startswith(("/", "./", "../", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"{source} is not a model folder: it has no config.json.")
    return _snapshot(text)


def tokenizer_named(source: str | Path | None) -> Any:
    """The tokenizer of a folder, which need not hold a model, or of a hub id or URL; None for no name and for no tokenizer there."""
    return None if source is None else read_tokenizer(Path(source) if Path(source).is_dir() else resolve(source))


@lru_cache(maxsize=64)
def _snapshot(name: str) -> Path:
    """The hub is asked once a process: a run that lasts for days sees one revision."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:
        raise FileNotFoundError(f"{name} is neither a local folder nor a hub id that can be reached: {error}") from error


def check_weights(source: str | Path, *, head: str) -> DecoderConfig:
    """Raise what `load` would of a folder's config and tensors, from the headers of its files; the config."""
    folder = resolve(source)
    config = read_config(folder)
    read, entries, stored, wanted, _ = _tensors(folder, config, head, None)
    check_shapes(read, entries, stored, wanted)
    read.close()
    return config


def _read_params(folder: Path, config: DecoderConfig, head: str, key: Array | None, mesh: Any) -> Params:
    """The parameter tree from a folder's tensors, float32, on the mesh."""
    read, entries, stored, wanted, new_head = _tensors(folder, config, head, key)
    params = read_params(read, entries, stored, wanted, mesh)
    if not new_head:
        return params
    made = with_head(params, key, config, head)["head"]
    return {**params, **sharding.place({"head": jax.device_get(made)}, mesh)}


def _tensors(
    folder: Path, config: DecoderConfig, head: str, key: Array | None
) -> tuple[TensorReader, list[Entry], dict[str, str], Params, bool]:
    """(reader, tensors to read, their names in the files, shapes of the model, whether its head is to be made).

    ValueError where the tensors are not those of such a model.
    """
    read = TensorReader(folder)
    names = {plain_name(name): name for name in read.files}
    prefix = prefix_of(config)
    # Some files hold the bare backbone, without the family's prefix.
    bare = not any(name.startswith(prefix) for name in names)
    heads = (SCORE, *lm_head_names(config))
    stored = {prefix + name if bare and name not in heads else name: there for name, there in names.items()}
    if head == "lm":
        first, *others = lm_head_names(config)
        for other in others:
            if other in stored:
                stored[first] = stored.pop(other)

    entries = layout(config, head)
    new_head = "head" in {path[0] for entry in entries for path in entry.paths} and entries[-1].name not in stored
    if key is None:
        _check_head(read, config, head, stored, new_head=new_head)
    entries = entries[:-1] if new_head else entries
    wanted = {entry.name for entry in entries}
    unknown = {name for name in stored.keys() - wanted if not is_ignored(name, config, head)}
    check_names(folder, f"{config.family} model", missing=wanted - stored.keys(), unknown=unknown)
    # Shapes of the model that the config describes, without computing anything.
    return read, entries, stored, jax.eval_shape(build_model(config, head=head).init, rng.root_key(0)), new_head


def _check_head(read: TensorReader, config: DecoderConfig, head: str, stored: dict[str, str], *, new_head: bool) -> None:
    """ValueError where the files hold another head than is asked for, or than config.json says."""
    lm_head, fault = lm_head_names(config)[0], ""
    if head == "lm" and SCORE in stored and lm_head not in stored:
        fault = f"no 'lm' head: it is a reward model ({SCORE}), which writes no text; name a policy, or pass key= for a new random head"
    elif new_head and head == "lm":
        fault = (
            f"no 'lm' head ({lm_head}), and its config.json does not say tie_word_embeddings: true; say so there if the embedding is the "
            "head, or pass key= for a new random one"
        )
    elif new_head:
        fault = f"no 'scalar' head ({SCORE}), so it is no reward model; a new head is random, pass key= for one"
    elif head == "scalar" and (labels := read.shape(stored[SCORE])[0]) != 1:
        fault = f"a head that scores {labels} labels, and a reward model one; name another model"
    elif head == "lm" and config.tied_head and lm_head in stored:
        table = next(stored.get(entry.name) for entry in layout(config, head) if entry.paths[0] == EMBEDDING)
        middle = read.shape(stored[lm_head])[0] // 2  # the first rows may be special tokens', which nothing trained
        parts = [[read.read(name, (slice(n, n + 8), slice(None))) for n in (0, middle)] for name in (stored[lm_head], table) if name]
        if not np.array_equal(parts[0], parts[-1]):
            fault = f"an {lm_head} that is not its embedding, and tie_word_embeddings: true; set that to false in its config.json"
    if fault:
        raise ValueError(f"{next(iter(read.files.values())).parent} has {fault}.")
