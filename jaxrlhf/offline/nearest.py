"""How much a stored response looks like what the policy writes now: cosines with the policy's generations.

`own_similarity` compares a response with the generation for its own prompt, as the FRFT paper's public code does; `nearest_similarity`
with its k most similar generations over all prompts; `nearest_index` says which generation that is. All take unit vectors, read the
stored ones once and a block at a time (they may be a memory map larger than memory), and search exactly.

The bits: every figure is a function of the two vectors alone up to the rounding of one float32 matrix product, whose order of addition
may change with the shape of a block on a device. Block and mesh therefore move a result by no more than that (about 1e-7), and between
blocks of one shape not at all.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrlhf import sharding
from jaxrlhf.rollouts.passes import one_behind
from jaxrlhf.storage.blocks import NOWHERE, Blocks, Results
from jaxrlhf.types import Array, Progress

BLOCK = 2048  # responses at a time: with TILE generations the products are 32 MiB
TILE = 4096  # generations at a time
UNIT_TOLERANCE = 1e-3  # of a vector's length: float16 storage passes, a forgotten normalisation does not
_GROUP = 16

Search = Callable[..., tuple[Array, Array]]  # (responses_BD, tiles_STD, live_ST) → (values_B, squared lengths_B)


class EmbeddingError(ValueError):
    """Vectors that no cosine can be taken of; the message names the row, the rule and the way out."""


def own_similarity(responses_ND: np.ndarray, generations_ND: np.ndarray, *, block: int = BLOCK) -> np.ndarray:
    """Cosine of every response with the generation in the same row: that of the policy for the response's own prompt. float32 [N].

    Summed in float64 and rounded once, so no block changes a bit. Raises EmbeddingError for vectors that are not of unit length or not
    finite, ValueError for shapes that do not fit. FRFT's public code, `dataset.py`: s = cos(E(g), E(y)).
    """
    _check_shapes(responses_ND, generations_ND)
    if len(responses_ND) != len(generations_ND):
        raise ValueError(
            f"{len(responses_ND)} responses and {len(generations_ND)} generations: own_similarity compares row with row. Line the "
            "generations up by prompt, or compare with the nearest over all prompts."
        )
    result = np.empty(len(responses_ND), np.float32)
    for start in range(0, len(result), _at_least_one("block", block)):
        window = slice(start, start + block)
        x, g = (np.asarray(a[window], np.float64) for a in (responses_ND, generations_ND))
        _check_lengths(np.einsum("nd,nd->n", x, x), "responses", start)
        _check_lengths(np.einsum("nd,nd->n", g, g), "generations", start)
        result[window] = np.einsum("nd,nd->n", x, g)
    return result


def nearest_similarity(
    responses_ND: np.ndarray,
    generations_MD: np.ndarray,
    *,
    k: int = 1,
    block: int = BLOCK,
    mesh: Any = None,
    **how: Any,
) -> np.ndarray:
    """Mean cosine of every response with its k most similar generations; float32 [N].

    Exact, in float32 at the highest matmul precision. One pass over the responses, cut over the mesh's `data` and `fsdp` axes `block`
    rows at a time; every device holds all generations and, at most, `block` × 4096 products. Equal cosines need no rule: whichever of them
    counts, the mean is the same. `how`: blocks and progress, as `over_batches` takes them. Raises EmbeddingError for vectors that are not
    of unit length or not finite, ValueError for shapes that do not fit and for a k of which there are not enough generations.
    """
    _check_shapes(responses_ND, generations_MD)
    _check_k(k, len(generations_MD))
    return _by_blocks(_mean_of_nearest(k, mesh), responses_ND, generations_MD, np.float32, block, mesh, **how)


def nearest_index(responses_ND: np.ndarray, generations_MD: np.ndarray, *, block: int = BLOCK, mesh: Any = None, **how: Any) -> np.ndarray:
    """Row of the most similar generation of every response, the first of equals; int32 [N]. Otherwise as `nearest_similarity`."""
    _check_shapes(responses_ND, generations_MD)
    _check_k(1, len(generations_MD))
    return _by_blocks(_first_nearest(mesh), responses_ND, generations_MD, np.int32, block, mesh, **how)


def top_k(scores_BM: Array, k: int) -> Array:
    """The k largest of every row, largest first; [B, k]. Exact, and faster than `lax.top_k` on long rows.

    The k largest elements lie in the k groups with the largest maxima: were one of them, e, in another group, each of those k groups
    would hold an element that is at least as large as e. So only k groups are searched.
    """
    if k == 1:
        return scores_BM.max(axis=1, keepdims=True)
    rows, width = scores_BM.shape
    groups = -(-width // _GROUP)
    if groups <= 2 * k:
        return lax.top_k(scores_BM, k)[0]
    padded = jnp.pad(scores_BM, ((0, 0), (0, groups * _GROUP - width)), constant_values=-jnp.inf)
    # A group is every groups-th column: its maximum is then taken between whole vectors of neighbours.
    grouped = padded.reshape(rows, _GROUP, groups)
    _, best = lax.top_k(grouped.max(axis=1), k)
    found = jnp.take_along_axis(grouped, best[:, None, :], axis=2)
    return lax.top_k(found.reshape(rows, k * _GROUP), k)[0]


def _products(responses_BD: Array, tile_TD: Array, live_T: Array) -> Array:
    """Cosines [B, T]; −∞ for the rows that only fill a tile."""
    # Highest precision: an accelerator would multiply in 10 or 7 bits of mantissa.
    return jnp.where(live_T, jnp.matmul(responses_BD, tile_TD.T, precision=lax.Precision.HIGHEST), -jnp.inf)


@lru_cache(maxsize=16)
def _mean_of_nearest(k: int, mesh: Any) -> Search:
    def search(responses_BD: Array, tiles_STD: Array, live_ST: Array) -> tuple[Array, Array]:
        def tile(best_Bk: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
            found = _products(responses_BD, *one)
            return lax.top_k(jnp.concatenate([best_Bk, top_k(found, min(k, found.shape[1]))], axis=1), k)[0], None

        if tiles_STD.shape[0] == 1 and k <= tiles_STD.shape[1]:
            best = top_k(_products(responses_BD, tiles_STD[0], live_ST[0]), k)
        else:
            best, _ = lax.scan(tile, jnp.full((responses_BD.shape[0], k), -jnp.inf), (tiles_STD, live_ST))
        return best.mean(axis=1), jnp.square(responses_BD).sum(axis=1)

    return sharding.rows(lambda tiles, responses_BD: search(responses_BD, *tiles), mesh, per_device=True)


@lru_cache(maxsize=16)
def _first_nearest(mesh: Any) -> Search:
    def search(responses_BD: Array, tiles_STD: Array, live_ST: Array) -> tuple[Array, Array]:
        def tile(state: tuple[Array, Array], one: tuple[Array, tuple[Array, Array]]) -> tuple[tuple[Array, Array], None]:
            (best, index), (first, vectors) = state, one
            found = _products(responses_BD, *vectors)
            here = jnp.argmax(found, axis=1)
            value = jnp.take_along_axis(found, here[:, None], axis=1)[:, 0]
            better = value > best  # an equal one in a later tile does not count: the first does
            return (jnp.where(better, value, best), jnp.where(better, first + here.astype(jnp.int32), index)), None

        rows, (tiles, width) = responses_BD.shape[0], live_ST.shape
        start = jnp.full(rows, -jnp.inf), jnp.zeros(rows, jnp.int32)
        firsts = jnp.arange(tiles, dtype=jnp.int32) * width
        (_, index), _ = lax.scan(tile, start, (firsts, (tiles_STD, live_ST)))
        return index, jnp.square(responses_BD).sum(axis=1)

    return sharding.rows(lambda tiles, responses_BD: search(responses_BD, *tiles), mesh, per_device=True)


def _by_blocks(
    search: Search,
    responses_ND: np.ndarray,
    generations_MD: np.ndarray,
    dtype: Any,
    block: int,
    mesh: Any,
    blocks: Blocks = NOWHERE,
    progress: Progress | None = None,
) -> np.ndarray:
    """`search` over blocks of one shape; the lengths of the responses' vectors, measured on the way, are looked at."""
    n = len(responses_ND)
    if n == 0:
        return np.empty(n, dtype)
    rows = sharding.rows_at_once(n, _at_least_one("block", block), mesh)
    tiles = sharding.replicate(_tiles(generations_MD), mesh)

    def compute(first: int) -> Iterator[Results]:
        starts = range(first * rows, n, rows)
        found = one_behind(search(tiles, sharding.place_batch(_filled(responses_ND[start : start + rows], rows), mesh)) for start in starts)
        for start, (values, squares) in zip(starts, found, strict=True):
            count = min(rows, n - start)
            _check_lengths(squares[:count], "responses", start)
            yield (values[:count].astype(dtype),)

    kept = blocks.of(f"nearest of {n} by {rows}", *(() if blocks is NOWHERE else (np.asarray(responses_ND), np.asarray(generations_MD))))
    return kept.collect(-(-n // rows), compute, progress=progress)[0]


def _filled(part_ND: np.ndarray, rows: int) -> np.ndarray:
    """[rows, D] float32; a last block is filled with its own first row."""
    part = np.asarray(part_ND, np.float32)
    return np.concatenate([part, np.broadcast_to(part[:1], (rows - len(part), part.shape[1]))])


def _tiles(generations_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Generations as equal tiles [S, T, D] of at most TILE rows, T whole groups of `top_k`, and which rows are real [S, T]."""
    generations = np.asarray(generations_MD, np.float32)
    _check_lengths(np.einsum("nd,nd->n", generations, generations), "generations", 0)
    m, width = generations.shape
    count = -(-m // TILE)
    size = -(-m // (count * _GROUP)) * _GROUP
    padded = np.zeros((count * size, width), np.float32)
    padded[:m] = generations
    return padded.reshape(count, size, width), (np.arange(count * size) < m).reshape(count, size)


def _check_shapes(responses: np.ndarray, generations: np.ndarray) -> None:
    for name, array in (("responses", responses), ("generations", generations)):
        if np.ndim(array) != 2 or array.dtype.kind != "f":
            raise ValueError(f"{name} have shape {np.shape(array)} and type {array.dtype}; they must be [rows, D] vectors of real numbers.")
    if responses.shape[1] != generations.shape[1]:
        raise ValueError(
            f"responses have {responses.shape[1]} dimensions and generations {generations.shape[1]}; embed both with the same encoder."
        )


def _check_k(k: int, generations: int) -> None:
    if not 1 <= k <= generations:
        raise ValueError(
            f"k is {k} and there are {generations} generations; it must lie between 1 and their number. Lower k or generate more."
        )


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1.")
    return value


def _check_lengths(squares_N: np.ndarray, name: str, start: int) -> None:
    """Raise EmbeddingError unless the squared lengths are 1 within the tolerance; a NaN or an infinity anywhere in a row shows in them."""
    bad = np.flatnonzero(~(np.abs(np.sqrt(np.asarray(squares_N, np.float64)) - 1) <= UNIT_TOLERANCE))
    if len(bad):
        length = float(np.sqrt(np.float64(squares_N[bad[0]])))
        what = f"has length {length:.4g}" if np.isfinite(length) else "is not finite"
        raise EmbeddingError(
            f"row {start + int(bad[0])} of the {name} {what} ({len(bad)} such rows in this block); every row must be a finite vector of "
            f"length 1 within {UNIT_TOLERANCE:g}. Divide each by its length; vectors that `jaxrlhf embed` "
            "made are of length 1 and have been damaged since: delete their folder and embed again."
        )
