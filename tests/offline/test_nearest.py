"""The search for the nearest generations: against numpy, over blocks, meshes, tiles and files, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.offline import nearest
from jaxrlhf.offline.nearest import EmbeddingError, nearest_index, nearest_similarity, own_similarity, top_k

ROUNDING = 5e-7  # of a float32 product of 64 terms whose absolute values sum to at most 1, and of a mean of 8


def unit(rows, width=64, seed=0):
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def brute_force(responses, generations, k):
    """Mean of the k largest cosines, by float64 products and a full sort."""
    cosines = responses.astype(np.float64) @ generations.astype(np.float64).T
    return np.sort(cosines, axis=1)[:, ::-1][:, :k].mean(axis=1)


@pytest.fixture(scope="module")
def large():
    return unit(2000, seed=1), unit(2000, seed=2)


@pytest.fixture(scope="module")
def small():
    return unit(101, 16, seed=3), unit(37, 16, seed=4)


@pytest.mark.parametrize("k", [1, 8])
def test_equals_brute_force_on_2000_by_2000(large, k):
    found = nearest_similarity(*large, k=k, block=768)  # 2 whole blocks and one of 464
    assert found.dtype == np.float32 and found.shape == (2000,)
    np.testing.assert_allclose(found, brute_force(*large, k), atol=ROUNDING)


@pytest.mark.parametrize("k", [1, 3, 37])
@pytest.mark.parametrize("block", [1, 10, 101, 5000])
def test_every_block_gives_the_same(small, k, block):
    np.testing.assert_allclose(nearest_similarity(*small, k=k, block=block), brute_force(*small, k), atol=ROUNDING)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2)], ids=str)
def test_every_mesh_gives_the_same(small, k, shape):
    """101 rows divide over nothing; every device has rows of its own and all generations."""
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    alone = nearest_similarity(*small, k=k, block=24)
    np.testing.assert_allclose(nearest_similarity(*small, k=k, block=24, mesh=mesh), alone, atol=ROUNDING)
    np.testing.assert_array_equal(nearest_index(*small, block=24, mesh=mesh), nearest_index(*small, block=24))


def test_devices_send_nothing_to_each_other(small):
    """Left to itself the compiler gathers all products on every device before a top-k."""
    mesh = sharding.make_mesh(4)
    tiles = sharding.replicate(nearest._tiles(small[1]), mesh)
    block = sharding.place_batch(small[0][:96], mesh)
    assert not block.sharding.is_fully_replicated and tiles[0].sharding.is_fully_replicated
    for search in (nearest._mean_of_nearest(5, mesh), nearest._first_nearest(mesh)):
        compiled = search.lower(tiles, block).compile().as_text()
        assert "all-" not in compiled and "collective" not in compiled


@pytest.mark.parametrize("k", [1, 8, 20, 37])
def test_more_generations_than_a_tile_are_searched_tile_by_tile(small, k, monkeypatch):
    """37 generations in tiles of 16 with 11 empty rows, which would win (−∞ < cosine) or tie (0 = cosine) if they counted."""
    monkeypatch.setattr(nearest, "TILE", 16)
    opposite = -np.abs(small[0]), np.abs(small[1])  # every cosine is negative: a row of zeros would be the nearest
    for responses, generations in (small, opposite):
        np.testing.assert_allclose(
            nearest_similarity(responses, generations, k=k, block=40), brute_force(responses, generations, k), atol=ROUNDING
        )
        exact = (responses.astype(np.float64) @ generations.T.astype(np.float64)).argmax(axis=1)
        np.testing.assert_array_equal(nearest_index(responses, generations, block=40), exact)


def test_one_generation_against_opposite_responses():
    g = unit(1, 8)
    np.testing.assert_allclose(nearest_similarity(np.concatenate([g, -g]), g), [1, -1], atol=ROUNDING)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_responses_may_be_a_file(small, tmp_path, dtype):
    np.save(tmp_path / "x.npy", small[0].astype(dtype))
    stored = np.load(tmp_path / "x.npy", mmap_mode="r")
    in_memory = stored.astype(np.float32)
    np.testing.assert_array_equal(
        nearest_similarity(stored, small[1], k=2, block=16), nearest_similarity(in_memory, small[1], k=2, block=16)
    )
    np.testing.assert_array_equal(own_similarity(stored[:37], small[1]), own_similarity(in_memory[:37], small[1]))


def test_the_file_is_read_once_and_a_block_at_a_time(small):
    class Watched:
        shape, dtype, ndim = small[0].shape, small[0].dtype, 2

        def __init__(self):
            self.read = []

        def __len__(self):
            return len(small[0])

        def __getitem__(self, window):
            part = small[0][window]
            self.read.append(len(part))
            return part

    watched, heard = Watched(), []
    nearest_similarity(watched, small[1], block=40, progress=lambda done, total: heard.append((done, total)))  # type: ignore[arg-type]
    assert watched.read == [40, 40, 21]
    assert heard == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_ties_do_not_matter_to_the_mean_and_the_first_is_the_nearest():
    g = np.eye(4, dtype=np.float32)[[2, 0, 0, 1, 0]]
    x = np.eye(4, dtype=np.float32)[[0, 1, 3]]
    np.testing.assert_array_equal(nearest_similarity(x, g, k=4), [0.75, 0.25, 0])
    np.testing.assert_array_equal(nearest_index(x, g), [1, 3, 0])
    order = [4, 3, 2, 1, 0]
    np.testing.assert_array_equal(nearest_similarity(x, g[order], k=4), [0.75, 0.25, 0])
    assert nearest_index(x, g).dtype == np.int32


def test_the_first_of_equals_is_the_nearest_across_tiles(monkeypatch):
    monkeypatch.setattr(nearest, "TILE", 16)
    g = np.eye(2, dtype=np.float32)[[1] * 15 + [0] * 20]
    np.testing.assert_array_equal(nearest_index(np.eye(2, dtype=np.float32), g), [15, 0])


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("kind", ["random", "rising", "falling", "equal", "one group", "few values", "minus infinity"])
def test_top_k_is_exact(k, kind):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(7, 403)).astype(np.float32)
    x = {
        "random": x,
        "rising": np.sort(x, axis=1),
        "falling": np.sort(x, axis=1)[:, ::-1],
        "equal": np.ones_like(x),
        # 403 columns are 26 groups of every 26th: all the largest share one, then all but the last few.
        "one group": np.where(np.arange(403) % 26 == 3, 10 + np.arange(403), x).astype(np.float32),
        "few values": rng.integers(0, 3, x.shape).astype(np.float32),
        "minus infinity": np.where(np.arange(403) < 400, -np.inf, x).astype(np.float32),
    }[kind]
    np.testing.assert_array_equal(top_k(jnp.asarray(x), k), np.sort(x, axis=1)[:, ::-1][:, :k])


def test_own_similarity_compares_row_with_row(small):
    responses, generations = small[0][:37], small[1]
    found = own_similarity(responses, generations, block=10)
    exact = (responses.astype(np.float64) * generations).sum(axis=1)
    np.testing.assert_array_equal(found, own_similarity(responses, generations))
    np.testing.assert_allclose(found, exact, atol=1e-7)
    assert found.dtype == np.float32


def test_no_responses_are_no_similarities(small):
    none = np.zeros((0, 16), np.float32)
    assert nearest_similarity(none, small[1]).shape == nearest_index(none, small[1]).shape == own_similarity(none, none).shape == (0,)


@pytest.mark.parametrize(("value", "says"), [(np.nan, "is not finite"), (np.inf, "is not finite"), (3.0, "has length 3")])
@pytest.mark.parametrize("row", [0, 40, 100])
def test_vectors_without_a_cosine_are_named(small, value, says, row):
    bad = small[0].copy()
    bad[row, 5] = value
    for search in (nearest_similarity, nearest_index):
        with pytest.raises(EmbeddingError, match=rf"row {row} of the responses {says}.*Divide each by its length"):
            search(bad, small[1], block=32)
        with pytest.raises(EmbeddingError, match=rf"row {row} of the generations {says}"):
            search(small[0], bad)
    with pytest.raises(EmbeddingError, match=rf"row {row} of the responses {says}"):
        own_similarity(bad, small[0], block=32)
    with pytest.raises(EmbeddingError, match=rf"row {row} of the generations {says}"):
        own_similarity(small[0], bad, block=32)


def test_shapes_and_numbers_that_do_not_fit_are_refused(small):
    x, g = small
    for k in (0, -1, 38):
        with pytest.raises(ValueError, match=rf"k is {k} and there are 37 generations; it must lie between 1"):
            nearest_similarity(x, g, k=k)
    with pytest.raises(ValueError, match="there are 0 generations"):
        nearest_index(x, g[:0])
    with pytest.raises(ValueError, match="responses have 15 dimensions and generations 16; embed both with the same encoder"):
        nearest_similarity(x[:, :15], g)
    with pytest.raises(ValueError, match="101 responses and 37 generations: own_similarity compares row with row"):
        own_similarity(x, g)
    with pytest.raises(ValueError, match=r"generations have shape \(16,\)"):
        nearest_similarity(x, g[0])
    with pytest.raises(ValueError, match="type int64"):
        own_similarity(np.ones((2, 2), np.int64), np.ones((2, 2), np.int64))
    with pytest.raises(ValueError, match="block is 0; it must be at least 1"):
        nearest_similarity(x, g, block=0)
    with pytest.raises(ValueError, match="block is 0; it must be at least 1"):
        own_similarity(g, g, block=0)
