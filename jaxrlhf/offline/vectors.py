"""Vectors of texts on disk: keyed by the text's content and the encoder's identity, computed once, memory-mapped.

    FOLDER/<encoder key>/index.json              the encoder, the dimension, and every shard that counts, with checksums of its files
                         vectors-00000.npy       float32 [n, D]
                         keys-00000.npy          uint8 [n, 32]: sha256 of each text (UTF-8)

A shard's two files are written, synced and renamed before the index that names them is replaced: a file that the index does not name
is the rest of a killed run and is overwritten. Texts that come later get further shards; what is there is never rewritten.

What is guaranteed: a run that is killed, however often, and started again with the same texts and options, on the same machine and
library versions, leaves the same bytes as one that was not. A shard is a fixed slice of the missing texts in a fixed order, so neither
the batch a text is computed in nor its mates depend on when the run was stopped. Between different sets of texts, batches differ, and
with them the last bits of a vector.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf import distributed
from jaxrlhf.files import faults, identities, listed_files, locked, read_sealed, sealed, sync
from jaxrlhf.offline.encoder_identity import EncoderIdentity, encoder_identity
from jaxrlhf.offline.encoders import check_texts, open_encoder
from jaxrlhf.storage.remote import is_url
from jaxrlhf.types import Progress

FORMAT = 1
INDEX = "index.json"


class VectorError(ValueError):
    """A folder of vectors that cannot be used as it is; the message says what to do."""


@dataclass(frozen=True)
class Embeddings:
    """The vectors of N texts, in the order the texts were given, in files that are memory-mapped.

    `vectors` is all of them as one array; `take(rows)` copies some of them out of the files without reading the others.
    """

    identity: EncoderIdentity
    folder: Path  # of this encoder
    rows_N: np.ndarray  # where each text's vector stands, counted over the shards
    shards: tuple[np.ndarray, ...]  # memory-mapped float32 [n, D]
    embedded: int  # texts that were computed now; the others were on disk

    def __len__(self) -> int:
        return len(self.rows_N)

    @property
    def dimension(self) -> int:
        return self.shards[0].shape[1] if self.shards else 0

    def take(self, rows: Any = slice(None)) -> np.ndarray:
        """float32 [n, D] of some texts, by their numbers (a slice or an array of ints)."""
        wanted = np.atleast_1d(self.rows_N[rows])
        starts = np.cumsum([0, *(len(shard) for shard in self.shards)])
        at = np.searchsorted(starts, wanted, side="right") - 1
        out = np.empty((len(wanted), self.dimension), np.float32)
        for number in np.unique(at):
            here = np.flatnonzero(at == number)
            out[here] = self.shards[number][wanted[here] - starts[number]]
        return out

    @cached_property
    def vectors(self) -> np.ndarray:
        """float32 [N, D]; copied once."""
        return self.take()


def embed_cached(
    texts: Sequence[str],
    *,
    folder: str | Path,
    batch_size: int = 64,
    mesh: Any = None,
    shard_rows: int = 2048,
    progress: Progress | None = None,
    **encoder: Any,
) -> Embeddings:
    """`embed_texts` through a folder: what is stored there under the same text and encoder is read, the rest computed and stored.

    Equal texts are computed once. Where nothing is missing, no encoder is loaded. A killed run goes on at its last finished shard of
    `shard_rows` texts. A second process that wants the same encoder's folder waits for the first. `progress` counts the missing texts.

    Errors: those of `embed_texts`; VectorError for a folder that holds something else or is damaged.
    """
    if shard_rows < 1:
        raise ValueError(f"shard_rows is {shard_rows}; a shard needs at least 1 text.")
    if is_url(folder):
        raise ValueError(f"vectors are mapped into memory from files of this machine; give a folder instead of {folder}.")
    check_texts(texts)
    keys = [text_key(text) for text in texts]
    identity = encoder_identity(**encoder)
    store, leads, embedded = _Store(Path(folder) / identity.key, identity), distributed.is_leader(), 0
    texts_in_order = sorted(dict(zip(keys, texts, strict=True)).items(), key=_order)
    if not distributed.agree(leads and store.read().keys() >= set(keys), "vectors: all there"):
        with locked(store.folder / ".lock", f"{store.folder} is being written") if leads else nullcontext():
            index = store.index() if leads else {}
            known = store.read(index) if leads else {}  # the process we waited for may have computed some
            unknown = [n for n, (key, _) in enumerate(texts_in_order) if key not in known]
            missing = [texts_in_order[n] for n in distributed.agree(unknown, "vectors: the texts that are missing")]
            embedded = len(missing)
            # A mesh goes over all processes; what does not use it the leader computes alone.
            together = mesh is not None and identity.backend == "flax"
            if missing and (leads or together):
                opened = open_encoder(identity, pooling=encoder.get("pooling"), batch_size=batch_size, mesh=mesh)
                store.add(index, missing, opened.embed, shard_rows, progress)
    if not leads:  # the folder may be on a disk that only the leader sees
        return Embeddings(identity, store.folder, np.arange(len(keys)), (distributed.agree_on_rows(None, "vectors"),), embedded)
    known = store.read()
    rows = np.fromiter((known[key] for key in keys), np.int64, len(keys))
    found = Embeddings(identity, store.folder, rows, store.shards(), embedded)
    if distributed.count() > 1:
        distributed.agree_on_rows(found.vectors, "vectors")
    return found


def text_key(text: str) -> bytes:
    """sha256 of the text's UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).digest()


def _order(item: tuple[bytes, str]) -> tuple[int, bytes]:
    """Long texts first: batches of like length, and an estimate of the time left that can only be too long."""
    return -len(item[1]), item[0]


class _Store:
    """The folder of one encoder. Reading needs no lock: the index names finished files only."""

    def __init__(self, folder: Path, identity: EncoderIdentity):
        self.folder, self.identity = folder, identity

    def index(self) -> dict[str, Any]:
        path = self.folder / INDEX
        if not path.exists():
            identity = {name: value for name, value in self.identity._asdict().items() if name != "source"}
            return {"format": FORMAT, "encoder": identity, "dimension": None, "shards": []}
        try:
            index = read_sealed(path)
            listed_files(index.get("files", {}))
        except ValueError as error:
            raise VectorError(f"{path} cannot be read ({error}); delete {self.folder} and embed again.") from error
        if index.get("format") != FORMAT:
            raise VectorError(
                f"{path} has format {index.get('format')!r}, this version reads {FORMAT}; delete {self.folder} and embed again."
            )
        for fault in faults(self.folder, index.get("files", {})):
            raise VectorError(f"{fault}; delete {self.folder} and embed again.")
        return index

    def read(self, index: dict[str, Any] | None = None) -> dict[bytes, int]:
        """Text key → row, over all shards in the order of the index (default: that on disk)."""
        known: dict[bytes, int] = {}
        before = 0
        for number, shard in enumerate((index or self.index())["shards"]):
            raw = self._array(f"keys-{number:05d}.npy", (shard["rows"], 32), "uint8").tobytes()
            known |= {raw[32 * n : 32 * n + 32]: before + n for n in range(shard["rows"])}
            before += shard["rows"]
        return known

    def shards(self) -> tuple[np.ndarray, ...]:
        index = self.index()
        shape = index["dimension"]
        return tuple(self._array(f"vectors-{n:05d}.npy", (s["rows"], shape), "float32") for n, s in enumerate(index["shards"]))

    def _array(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        path = self.folder / name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise VectorError(f"{path} cannot be read ({error}); delete {self.folder} and embed again.") from error
        if array.shape != shape or array.dtype != dtype:
            raise VectorError(
                f"{path} is {array.dtype} {list(array.shape)}, not {dtype} {list(shape)}; delete {self.folder} and embed again."
            )
        return array

    def add(
        self,
        index: dict[str, Any],
        missing: list[tuple[bytes, str]],
        embed: Callable[..., np.ndarray],
        shard_rows: int,
        progress: Progress | None,
    ) -> None:
        """Compute and store, a shard at a time, behind the shards of `index`. Of several processes the leader stores."""
        if progress:
            progress(0, len(missing))
        for start in range(0, len(missing), shard_rows):
            part = missing[start : start + shard_rows]
            report = None if progress is None else lambda done, _, start=start: progress(start + done, len(missing)) if done else None
            vectors = embed([text for _, text in part], report)
            if not np.isfinite(vectors).all():
                bad = part[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])][1]
                raise VectorError(f"the encoder gives no finite vector for the text {bad[:60]!r}; its weights or dtype are at fault.")
            if not distributed.is_leader():
                continue
            number = len(index["shards"])
            keys = np.frombuffer(b"".join(key for key, _ in part), np.uint8).reshape(len(part), 32)
            names = (f"vectors-{number:05d}.npy", f"keys-{number:05d}.npy")
            _write_array(self.folder / names[0], np.ascontiguousarray(vectors, np.float32))
            _write_array(self.folder / names[1], keys)
            index |= {"dimension": vectors.shape[1], "shards": [*index["shards"], {"rows": len(part)}]}
            index |= sealed(index | {"files": index.get("files", {}) | identities(self.folder, names)})
            _write(self.folder / INDEX, lambda file, index=index: file.write((json.dumps(index, indent=1) + "\n").encode()))


def _write_array(path: Path, array: np.ndarray) -> None:
    _write(path, lambda file: np.save(file, array, allow_pickle=False))


def _write(path: Path, fill: Callable[[Any], Any]) -> None:
    """The file is whole and on the disk before it has its name. What a kill leaves has one name, and the next run writes over it."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        fill(file)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)
