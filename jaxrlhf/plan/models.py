"""The models a config stands for, as shapes: read from what is on this machine or known by name; nothing is fetched, nothing is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxrlhf import rng, sharding
from jaxrlhf.config import Config
from jaxrlhf.data import toy
from jaxrlhf.data.tokens import pad_id_of
from jaxrlhf.models.encoder import BertConfig
from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.hub import Loaded, eos_ids, read_config, read_tokenizer
from jaxrlhf.models.hub.encoder import encoder_folder, read_encoder_config, read_sentence_folder
from jaxrlhf.models.hub.published import KNOWN, known_shape
from jaxrlhf.models.model import build_model
from jaxrlhf.models.transformer import DecoderConfig
from jaxrlhf.pipeline import inputs
from jaxrlhf.types import Model, Params


@dataclass(frozen=True)
class PlannedModels:
    """The decoders of a run. `reward` is the base's with the row for a pad token that a saved reward model may need."""

    base: DecoderConfig
    reward: DecoderConfig
    gold: DecoderConfig | None
    encoder: BertConfig | None
    encoder_note: str  # why the encoder is not planned; "" where it is, or where there is none
    vocab_size: int | None  # ids of the tokenizer, where it could be read
    eos_ids: tuple[int, ...]
    pad_id: int

    def at_depth(self, layers: int) -> PlannedModels:
        """The same models with so many layers, for compilations that stand for deeper ones."""
        return replace(self, **{name: shallow(getattr(self, name), layers) for name in ("base", "reward", "gold")})


def shallow(decoder: Any, layers: int) -> Any:
    """The decoder (or None) with at most so many layers."""
    if decoder is None or decoder.num_layers <= layers:
        return decoder
    return replace(decoder, num_layers=layers, sliding_layers=tuple(n for n in decoder.sliding_layers if n < layers))


def planned_models(config: Config, *, uses_encoder: bool) -> PlannedModels:
    """What the run loads. Raises FileNotFoundError for a model whose shape is nowhere on this machine, and ValueError for texts that are
    longer than the model has positions."""
    base, tokenizer = _base(config)
    inputs.check_model(config, base, tokenizer)
    eos = eos_ids(Loaded(None, None, tokenizer, base)) or (0,)  # type: ignore[arg-type]  # reads the last two alone
    rows = base.vocab_size if tokenizer is None else base.vocab_size + _needs_a_row(tokenizer, base.vocab_size)
    gold = shape_of(config.gold.source or "", "gold.source") if config.gold.kind == "model" else None
    encoder, note = _encoder(config) if uses_encoder else (None, "")
    ids, pad = (None, 0) if tokenizer is None else (len(tokenizer), pad_id_of(tokenizer))
    return PlannedModels(base, replace(base, vocab_size=rows), gold, encoder, note, ids, eos, pad)


def _base(config: Config) -> tuple[DecoderConfig, Any]:
    """(the base model's shape, the tokenizer where it can be read without fetching)."""
    source = config.tokenizer.source or config.model.source
    folder = None if source is None else _at_hand(source)
    tokenizer = read_tokenizer(folder) if folder is not None else None
    if config.model.source is not None:
        return shape_of(config.model.source, "model.source"), tokenizer
    if source is None and config.data.train == inputs.TOY:
        tokenizer = toy.toy_tokenizer()
    if source is not None and tokenizer is None:
        raise FileNotFoundError(
            f"tokenizer.source {source} is not on this machine, and the size of its vocabulary is wanted; give a folder."
        )
    longest = config.data.limits.max_prompt_length + inputs.longest_response(config)
    shape = {name: value for name, value in asdict(config.model.shape).items() if value is not None}
    rows = config.tokenizer.vocab_size if tokenizer is None else len(tokenizer)
    ids: dict[str, Any] = {} if tokenizer is None else {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    return config_from_shape(shape, rows, max_positions=longest, **ids)[0], tokenizer


def shape_of(source: str, name: str) -> DecoderConfig:
    """A model's shape: from its folder, else from the hub's cache, else as it was published."""
    folder = _at_hand(source)
    found = known_shape(source) if folder is None else read_config(folder)
    if found is None:
        raise FileNotFoundError(
            f"{name} {source!r} is no folder with a config.json, is not in the hub's cache and its shape is not known here; give a folder "
            f"that holds its config.json (no weights are needed). Known are {', '.join(KNOWN)}."
        )
    return found


def _at_hand(source: str) -> Path | None:
    """The folder of a model or tokenizer that is on this machine: itself, or in the hub's cache."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.count("/") > 1 or source.startswith((".", "~", "/")):
        return None
    from huggingface_hub import constants

    if not (Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}").is_dir():
        return None  # before the import of what looks closer, which takes a third of a second
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(source, file) for file in ("config.json", "tokenizer.json")]
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def _needs_a_row(tokenizer: Any, rows: int) -> int:
    """1 where a saved reward model gets a pad token and the embedding has no spare row for it (`hub.save`)."""
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    own = tokenizer.pad_token_id is not None and pad_id_of(tokenizer) not in taken
    return int(not own and len(tokenizer) >= rows)


def _encoder(config: Config) -> tuple[BertConfig | None, str]:
    source = config.encoder.source
    folder = None if source is None else _at_hand(source)
    if source is not None and folder is None:
        return None, f"the sentence encoder is not planned: encoder.source {source} is not on this machine."
    try:
        folder = read_sentence_folder(folder or encoder_folder(None)).folder
    except ModuleNotFoundError as error:
        return None, f"the sentence encoder is not planned: {error}"
    return read_encoder_config(folder), ""


def models_of(config: Config, subjects: PlannedModels, mesh: Any) -> tuple[Model, Model]:
    """The policy's functions and those of reward model and critic, as `hub.load` builds them for the devices of `mesh`."""
    names = ("dtype", "matmul_precision", "remat", "logits_chunk")
    how = {name: getattr(config.model, name) for name in names} | sharding.row_constraints(mesh)
    return build_model(subjects.base, head="lm", **how), build_model(subjects.reward, head="scalar", **how)


def gold_model(config: Config, gold: DecoderConfig, mesh: Any) -> Model:
    """The functions of the gold model, as its scorer loads it."""
    how = {"remat": "none", "logits_chunk": None} | sharding.row_constraints(mesh)
    return build_model(gold, head="scalar", dtype=config.gold.dtype, **how)


def shapes_of(decoder: DecoderConfig, head: str) -> Params:
    """The shapes of a model's parameters: one layer is traced, for all are alike."""
    return deepened(jax.eval_shape(build_model(shallow(decoder, 1), head=head).init, KEY), decoder.num_layers)


def one_layer(tree: Any) -> Any:
    """A tree of parameters, or one that has such trees in it, without the layers after the first."""
    return _layers(tree, lambda part: {name: leaf for name, leaf in part.items() if not name.startswith(LAYER) or name == FIRST})


def deepened(tree: Any, layers: int) -> Any:
    """The inverse of `one_layer`."""
    return _layers(tree, lambda part: part | {f"{LAYER}{number}": part[FIRST] for number in range(layers)})


def depth(tree: Any) -> int:
    """How many layers the decoders of a tree have; 1 where it has none."""
    parts = [part for part in jax.tree.leaves(tree, is_leaf=_has_layers) if _has_layers(part)]
    return max((sum(name.startswith(LAYER) for name in part) for part in parts), default=1)


def _layers(tree: Any, change: Callable[[Params], Params]) -> Any:
    return jax.tree.map(lambda node: change(node) if _has_layers(node) else node, tree, is_leaf=_has_layers)


def _has_layers(node: Any) -> bool:
    return isinstance(node, dict) and FIRST in node


LAYER = "layers_"
FIRST = f"{LAYER}0"
KEY = jax.eval_shape(lambda: rng.root_key(0))
