"""Read a model from a Hugging Face folder or hub id, or make one from scratch. Safetensors only."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
from jax import Array

from jaxrlhf import rng, sharding
from jaxrlhf.models.families import config_from_hf
from jaxrlhf.models.heads import check_head, with_head
from jaxrlhf.models.hub.loaded import Loaded
from jaxrlhf.models.hub.read_params import check_names, read_params
from jaxrlhf.models.hub.safetensors import TensorReader, read_json
from jaxrlhf.models.hub.tensor_names import SCORE, is_ignored, layout, lm_head_names, prefix_of
from jaxrlhf.models.hub.tokenizer import read_tokenizer
from jaxrlhf.models.model import build_model
from jaxrlhf.models.transformer import DecoderConfig
from jaxrlhf.storage import copies, remote
from jaxrlhf.types import Params

# The files of a model folder that anything here reads: what is fetched from the hub, and what a folder's identity consists of.
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


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
    names = {entry.name for entry in entries}
    unknown = {name for name in stored.keys() - names if not is_ignored(name, config, head)}
    check_names(folder, f"{config.family} model", missing=names - stored.keys(), unknown=unknown)
    # Shapes of the model that the config describes, without computing anything.
    wanted = jax.eval_shape(build_model(config, head=head).init, rng.root_key(0))
    params = read_params(read, entries, stored, wanted, mesh)
    if not new_head:
        return params
    made = with_head(params, key, config, head)["head"]
    return {**params, **sharding.place({"head": jax.device_get(made)}, mesh)}
