"""Sentence encoders in memory: sentence-transformers, or our own Flax encoder, which needs no torch and runs on a mesh."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf import sharding
from jaxrlhf.models.hub.encoder import LoadedClassifier, load_encoder, tokenize, tokenize_pairs
from jaxrlhf.offline.encoder_identity import EncoderIdentity
from jaxrlhf.rollouts.passes import one_behind
from jaxrlhf.types import Progress

# Widths of padded batches: multiples of the step up to the limit, so that little is padded and few shapes are compiled.
_STEPS = ((4, 32), (8, 128), (16, 256), (32, 2**31))


class TextEncoder(NamedTuple):
    """An encoder in memory: `embed(texts, progress)` → float32 [N, D] of unit length, in the order of the texts."""

    identity: EncoderIdentity
    embed: Callable[[Sequence[str], Progress | None], np.ndarray]


def check_texts(texts: Sequence[str]) -> None:
    """TypeError for what is not text, ValueError for text that is not valid Unicode; the message names the row."""
    if isinstance(texts, str):
        raise TypeError("texts is one string; give a list of texts.")
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {n} is a {type(text).__name__}; texts must be strings.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {n} holds a lone surrogate at character {error.start}, which is no valid Unicode; "
                "clean it with text.encode('utf-8', 'replace').decode() or leave it out."
            ) from None


def open_encoder(identity: EncoderIdentity, *, pooling: str | None = None, batch_size: int = 64, mesh: Any = None) -> TextEncoder:
    """Load the encoder that `encoder_identity` named. `pooling`: the override it was given, if any."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 text is needed.")
    make = _flax if identity.backend == "flax" else _sentence_transformers
    return TextEncoder(identity, make(identity, pooling, batch_size, mesh))


def _flax(identity: EncoderIdentity, pooling: str | None, batch_size: int, mesh: Any):
    encoder = load_encoder(identity.source, pooling=pooling, max_length=identity.max_length, dtype=identity.dtype, mesh=mesh)

    def embed(texts: Sequence[str], progress: Progress | None = None) -> np.ndarray:
        out = np.zeros((len(texts), encoder.config.hidden_size), np.float32)
        ids = tokenize(encoder, texts)
        rows = [(row,) for row in ids]

        def run(tokens: np.ndarray, mask: np.ndarray) -> Any:
            return compiled_pass(encoder.bert.encode, mesh)(encoder.params, sharding.place_batch((tokens, mask), mesh))

        _fill(out, run, rows, batch_size, encoder.max_length, mesh, progress)
        return out

    return embed


def classify_pairs(
    classifier: LoadedClassifier,
    first: Sequence[str],
    second: Sequence[str],
    *,
    batch_size: int = 64,
    mesh: Any = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Logits float32 [N, C] of pairs of texts (premise, hypothesis), in their order; column c is `classifier.labels[c]`.

    `mesh` is the one that `load_classifier` placed the parameters on.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} first texts and {len(second)} second texts make no pairs; give as many of both.")
    check_texts(first)
    check_texts(second)
    out = np.zeros((len(first), len(classifier.labels)), np.float32)

    def run(tokens: np.ndarray, mask: np.ndarray, types: np.ndarray) -> Any:
        return compiled_pass(classifier.bert.classify, mesh)(classifier.params, sharding.place_batch((tokens, mask, types), mesh))

    _fill(out, run, tokenize_pairs(classifier, first, second), batch_size, classifier.max_length, mesh, progress)
    return out


@lru_cache(maxsize=16)
def compiled_pass(function: Callable[..., Any], mesh: Any) -> Callable[..., Any]:
    """An encoder's function compiled for the devices, of (params, arrays)."""
    return sharding.rows(lambda params, arrays: function(params, *arrays), mesh)


def padded_width(length: int, longest: int) -> int:
    """The width of the batch whose longest text has `length` tokens; never more than `longest`, the encoder's limit."""
    step = next(step for step, limit in _STEPS if length <= limit)
    return min(-(-length // step) * step, longest)


def _fill(
    out: np.ndarray,
    run: Callable[..., Any],
    rows: Sequence[tuple[list[int], ...]],
    batch_size: int,
    longest: int,
    mesh: Any,
    progress: Progress | None,
) -> None:
    """Write the result of every row into `out`, a batch behind the one that is computed. A row is its ids, and its types if any."""
    waiting: deque[np.ndarray] = deque()

    def results() -> Iterator[Any]:
        for members, arrays in _batches(rows, batch_size, longest, mesh):
            waiting.append(members)
            yield run(*arrays)

    done, report = 0, progress or (lambda done, total: None)
    report(done, len(rows))
    for result in one_behind(results()):
        members = waiting.popleft()
        out[members] = result[: len(members)]
        done += len(members)
        report(done, len(rows))


def _batches(
    rows: Sequence[tuple[list[int], ...]], batch_size: int, longest: int, mesh: Any
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
    """(row numbers, arrays [B, T]) from the longest rows to the shortest: ids, mask, and types where the rows have them.

    B is the same for all (a power of two where there are fewer rows than `batch_size`) and T one of few widths, so a second pass over other
    texts compiles next to nothing. Missing rows of the last batch are padding throughout.
    """
    if not rows:
        return
    height = min(batch_size, 1 << (len(rows) - 1).bit_length())
    height = sharding.rows_at_once(height, height, mesh)
    order = np.argsort([-len(row[0]) for row in rows], kind="stable")
    for start in range(0, len(rows), height):
        members = order[start : start + height]
        width = padded_width(len(rows[members[0]][0]), longest)
        arrays = tuple(np.zeros((height, width), np.int32) for _ in rows[0])
        mask = np.zeros((height, width), bool)
        for n, member in enumerate(members):
            for array, values in zip(arrays, rows[member], strict=True):
                array[n, : len(values)] = values
            mask[n, : len(rows[member][0])] = True
        yield members, (arrays[0], mask, *arrays[1:])


def _sentence_transformers(identity: EncoderIdentity, pooling: str | None, batch_size: int, mesh: Any):
    """The library's own `encode`, on its own device; `mesh` is not for it."""
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "sentence_transformers":
            raise
        raise ModuleNotFoundError(
            "the backend sentence-transformers is not installed: pip install 'jaxrlhf[sbert]', or take the backend flax.", name=error.name
        ) from error
    model: Any = SentenceTransformer(identity.source, trust_remote_code=False, local_files_only=True)
    if pooling is not None:
        _set_pooling(model, pooling)
    if identity.max_length is not None:
        model.max_seq_length = identity.max_length
    dimension = int(model.encode([""], show_progress_bar=False).shape[1])
    at_once = 16 * batch_size  # texts between two reports

    def embed(texts: Sequence[str], progress: Progress | None = None) -> np.ndarray:
        out = np.zeros((len(texts), dimension), np.float32)
        order = np.argsort([-len(text) for text in texts], kind="stable")
        report = progress or (lambda done, total: None)
        report(0, len(texts))
        for start in range(0, len(texts), at_once):
            members = order[start : start + at_once]
            chosen = [texts[n] for n in members]
            out[members] = model.encode(chosen, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
            report(min(start + at_once, len(texts)), len(texts))
        return out

    return embed


def _set_pooling(model: Any, pooling: str) -> None:
    kinds = [type(module).__name__ for module in model]
    if kinds.count("Pooling") != 1:
        raise ValueError(f"pooling {pooling} cannot be set on an encoder of modules {', '.join(kinds)}; leave it out.")
    at = kinds.index("Pooling")
    old = model[at]
    dimension = old.get_config_dict().get("embedding_dimension") or old.get_config_dict()["word_embedding_dimension"]
    model[at] = type(old)(dimension, pooling_mode=pooling)
