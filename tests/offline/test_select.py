"""Every selection rule worked by hand, whatever the order of the rows; the random control; the columns on disk and in batches."""

import itertools
import json

import jax
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.config import FilterConfig
from jaxrlhf.data.batches import batches
from jaxrlhf.data.columns import ColumnError, join_columns, read_header, write_columns
from jaxrlhf.data.pairs import Pair
from jaxrlhf.offline.select import (
    NAMES,
    RULES,
    SelectionError,
    keep_flags,
    random_subset,
    score_of,
    select,
    similarity_header,
    texts_of,
)
from jaxrlhf.types import PairBatch

# Five pairs. Sums: a 1.0, b 0.9, c 1.2, d 1.1, e 0.5; larger side: a 0.9, b 0.5, c 0.6, d 0.8, e 0.4.
IDS = ["a", "b", "c", "d", "e"]
CHOSEN = np.array([0.9, 0.4, 0.6, 0.3, 0.4], np.float32)
REJECTED = np.array([0.1, 0.5, 0.6, 0.8, 0.1], np.float32)


def kept(rule, order=None, ids=IDS, chosen=CHOSEN, rejected=REJECTED, keys=None, **limits):
    """The ids kept, in the order of the rows, which may first be shuffled."""
    order = list(range(len(ids)) if order is None else order)
    ids = [ids[i] for i in order]
    keys = None if keys is None else [keys[i] for i in order]
    rows = select(chosen[order], rejected[order], ids, rule=rule, keys=keys, **limits)
    assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()
    return [ids[i] for i in rows]


BY_HAND = [
    # rule, n, threshold, what is kept
    ("either", 1, None, "a"),
    ("either", 3, None, "acd"),
    ("either", None, 0.5, "abcd"),  # ≥: b's 0.5 is enough
    ("either", None, 0.51, "acd"),
    ("either", 2, 0.5, "ad"),
    ("either", 9, 0.85, "a"),
    ("both", 1, None, "c"),
    ("both", 3, None, "acd"),  # by the sum: c, d, a; by the smaller side it would be c, b, d
    ("both", None, 0.4, "bc"),
    ("both", None, 0.3, "bcd"),
    ("both", 2, 0.3, "cd"),  # of b, c, d the two with the largest sums
    ("chosen", 2, None, "ac"),
    ("chosen", 3, None, "abc"),  # b and e tie at 0.4: the smaller id
    ("chosen", None, 0.4, "abce"),
    ("rejected", 2, None, "cd"),
    ("rejected", None, 0.5, "bcd"),
    ("rejected", 2, 0.1, "cd"),
    ("half-half", 1, None, "a"),  # the chosen side begins
    ("half-half", 2, None, "ad"),  # a by chosen, d by rejected
    ("half-half", 3, None, "acd"),  # … and c by chosen: the odd one is the chosen side's
    ("half-half", 4, None, "abcd"),  # … where c is taken already, so the rejected side takes b
    ("half-half", 5, None, "abcde"),
    ("half-half", None, 0.6, "acd"),  # a and c by chosen, c and d by rejected
    ("half-half", 4, 0.6, "acd"),
    ("half-half", 2, 0.6, "ad"),
    ("half-half", 2, 0.85, "a"),  # no rejected side reaches it
]


@pytest.mark.parametrize(("rule", "n", "threshold", "expected"), BY_HAND)
def test_rules_by_hand_in_every_order(rule, n, threshold, expected):
    for order in itertools.permutations(range(5)):
        assert sorted(kept(rule, order, n=n, threshold=threshold)) == sorted(expected)


def test_rows_come_in_their_own_order():
    assert kept("either", [3, 4, 2, 1, 0], n=3) == ["d", "c", "a"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ties_go_to_the_smaller_id(rule, n):
    level = np.full(5, 0.5, np.float32)
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]):
        assert sorted(kept(rule, order, chosen=level, rejected=level, n=n)) == IDS[:n]


def test_the_halves_are_those_of_the_public_code_where_they_do_not_overlap():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.permutation(40) / 100 + 0.2, rng.permutation(40) / 100 + 0.2
    chosen[:5], rejected[5:10] = 0.9 - np.arange(5) / 100, 0.9 - np.arange(5) / 100
    ids = [f"{i:02d}" for i in range(40)]
    np.testing.assert_array_equal(select(chosen, rejected, ids, rule="half-half", n=10), np.arange(10))
    assert len(select(chosen, chosen, ids, rule="half-half", n=10)) == 10  # equal halves: ten distinct pairs all the same


def test_a_side_that_finds_its_best_taken_takes_its_next():
    """a is the best of both sides: the turn is not lost, so b is the rejected side's and not c the chosen side's."""
    chosen, rejected = np.array([0.9, 0.1, 0.8], np.float32), np.array([0.9, 0.7, 0.1], np.float32)
    assert kept("half-half", ids=["a", "b", "c"], chosen=chosen, rejected=rejected, n=2) == ["a", "b"]


def test_a_threshold_is_compared_as_the_similarities_are_stored():
    """0.9 and 0.8 lie on different sides of the nearest float32."""
    for level in (0.9, 0.8):
        for dtype in (np.float32, np.float64):
            side = np.array([level, level - 1e-6], dtype)
            for rule in RULES:
                np.testing.assert_array_equal(select(side, side, ["a", "b"], rule=rule, threshold=level), [0])


def test_equal_texts_are_kept_once_under_the_smallest_id():
    ids, keys = ["x-1", "x", "y", "z"], ["t", "t", "u", "v"]
    chosen, rejected = np.array([0.9, 0.9, 0.5, 0.4], np.float32), np.zeros(4, np.float32)
    for rule in ("either", "both", "chosen", "rejected", "half-half"):
        for order in itertools.permutations(range(4)):
            assert sorted(kept(rule, order, ids, chosen, rejected, n=2)) != sorted(kept(rule, order, ids, chosen, rejected, keys, n=2))
            assert sorted(kept(rule, order, ids, chosen, rejected, keys, n=2)) == ["x", "y"]
            assert sorted(kept(rule, order, ids, chosen, rejected, keys, n=4)) == ["x", "y", "z"]
    pairs = [Pair("1", "p", "c", "r", "f:1"), Pair("2", "p", "c", "r", "f:2", margin=1.0), Pair("3", "p", "r", "c", "f:3")]
    first, again, other = texts_of(pairs)
    assert first == again != other


def test_too_few_is_logged_and_none_is_an_error(caplog):
    assert kept("either", n=9) == IDS
    assert "filter.n asks for 9 pairs and only 5 of 5 pass" in caplog.text
    caplog.clear()
    kept("either", n=5)
    assert not caplog.records
    highest = {"either": "0.9000", "both": "0.6000", "chosen": "0.9000", "rejected": "0.8000", "half-half": "0.9000"}
    for rule in RULES:
        with pytest.raises(SelectionError, match=rf"no pair reaches filter.threshold 0.95 under rule '{rule}'.*{highest[rule]}. Lower it"):
            kept(rule, threshold=0.95)


def test_what_cannot_be_selected_from_is_refused():
    for limits, says in (
        ({}, "neither filter.n nor filter.threshold"),
        ({"n": 0}, "filter.n is 0; at least one"),
        ({"threshold": 80.0}, r"filter.threshold is 80.0; it is a cosine and lies in \[-1, 1\]"),
    ):
        with pytest.raises(SelectionError, match=says):
            kept("either", **limits)
    with pytest.raises(SelectionError, match=r"filter.rule is 'all'; it must be one of either, both, chosen, rejected, half-half"):
        kept("all", n=1)
    with pytest.raises(SelectionError, match="the rejected similarity of pair 'b' is nan"):
        kept("chosen", rejected=np.array([0, np.nan, 0, 0, 0]), n=1)
    with pytest.raises(SelectionError, match=r"chosen similarities have shape \(4,\) for 5 pairs"):
        select(CHOSEN[:4], REJECTED, IDS, rule="both", n=1)
    with pytest.raises(SelectionError, match="pair id 'a' occurs twice"):
        kept("either", ids=["a", "b", "a", "d", "e"], n=1)
    with pytest.raises(SelectionError, match="there are no pairs"):
        select(CHOSEN[:0], REJECTED[:0], [], rule="both", n=1)
    with pytest.raises(SelectionError, match="2 keys for 5 pairs"):
        select(CHOSEN, REJECTED, IDS, rule="both", n=1, keys=["x", "y"])


def test_the_random_control_depends_on_seed_and_ids_alone():
    ids = [f"pair-{i}" for i in range(200)]
    drawn = random_subset(ids, 50, seed=3)
    assert drawn.dtype == np.int64 and len(set(drawn.tolist())) == 50 and (np.diff(drawn) > 0).all()
    order = np.random.default_rng(0).permutation(200)
    shuffled = [ids[i] for i in order]
    assert {shuffled[i] for i in random_subset(shuffled, 50, seed=3)} == {ids[i] for i in drawn}
    assert set(random_subset(ids, 20, seed=3)) < set(drawn)  # a smaller budget draws from the same row
    assert len(set(random_subset(ids, 50, seed=4)) & set(drawn)) < 30
    for start in (0, 100):  # no part of the ids is preferred
        assert 10 <= ((drawn >= start) & (drawn < start + 100)).sum() <= 40


def test_the_random_control_keeps_one_of_equal_texts_too(caplog):
    ids, keys = ["x-1", "x", "y", "z"], ["t", "t", "u", "v"]
    np.testing.assert_array_equal(random_subset(ids, 4, seed=0, keys=keys), [1, 2, 3])
    assert "only 3 of 4" in caplog.text
    np.testing.assert_array_equal(random_subset(ids, 4, seed=0), [0, 1, 2, 3])
    with pytest.raises(SelectionError, match=r"filter.n is 0"):
        random_subset(ids, 0, seed=0)


def test_scores_are_what_the_rules_rank_by():
    np.testing.assert_allclose(score_of("both", CHOSEN, REJECTED), [1.0, 0.9, 1.2, 1.1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(score_of("half-half", CHOSEN, REJECTED), np.maximum(CHOSEN, REJECTED))
    np.testing.assert_array_equal(keep_flags(np.array([0, 3]), 5), [True, False, False, True, False])


SECTION = {"rule": "either", "n": 2, "threshold": None, "compare": "nearest", "k": 8, "embed": "response", "dedupe": True}
SOURCES = {"dataset": "d", "policy": "p", "generations": "g", "encoder": {"source": "e", "pooling": "mean"}}


def header_of(**changes):
    changed = SECTION | SOURCES | changes
    return similarity_header(FilterConfig(**{name: changed[name] for name in SECTION}), **{name: changed[name] for name in SOURCES})


@pytest.fixture
def folder(tmp_path):
    columns = {"chosen_similarity": CHOSEN, "rejected_similarity": REJECTED, "keep": keep_flags(np.array([0, 3]), 5)}
    return write_columns(tmp_path / "near", IDS, columns, header_of())


def test_columns_come_back_by_pair_id(folder):
    got = join_columns(["d", "b"], folder, NAMES, expect=header_of())
    np.testing.assert_array_equal(got["chosen_similarity"], CHOSEN[[3, 1]])
    np.testing.assert_array_equal(got["rejected_similarity"], REJECTED[[3, 1]])
    np.testing.assert_array_equal(got["keep"], [True, False])
    assert [got[name].dtype for name in ("chosen_similarity", "rejected_similarity", "keep")] == [np.float32, np.float32, np.bool_]
    json.dumps(read_header(folder))


@pytest.mark.parametrize("field", [*SECTION, *SOURCES])
def test_a_stale_column_names_the_field(folder, field):
    changed = header_of(**{field: "own" if field == "compare" else 0.5})
    name = {"policy": "model"}.get(field, field)
    with pytest.raises(ColumnError, match=rf"stale: it was computed with {name} "):
        join_columns(["e", "a"], folder, NAMES, expect=changed)


def test_k_is_no_part_of_a_comparison_with_the_own_prompt():
    assert header_of(compare="own", k=8) == header_of(compare="own", k=1)
    assert header_of() != header_of(k=1)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_the_columns_feed_sharded_batches_on_any_mesh(folder, devices):
    mesh = sharding.make_mesh(devices, devices=jax.devices()[:devices])
    columns = join_columns(IDS, folder, NAMES, expect={})
    tokens, mask, ones = np.arange(10, dtype=np.int32).reshape(5, 2), np.ones((5, 2), bool), np.ones(5, bool)
    table = PairBatch(tokens, mask, tokens, mask, tokens, mask, np.ones(5, np.float32), ones, np.arange(5, dtype=np.int32), columns)  # type: ignore[arg-type]
    seen = {}
    for batch in batches(table, 4, seed=0, epochs=1):
        placed = sharding.place_batch(batch, mesh)
        assert len(placed.columns["keep"].addressable_shards) == devices
        assert placed.columns["keep"].addressable_shards[0].data.shape == (4 // devices,)
        back = sharding.gather(placed)
        for row in np.flatnonzero(back.row_mask_B):
            seen[int(back.index_B[row])] = tuple(
                float(back.columns[name][row]) for name in ("chosen_similarity", "rejected_similarity", "keep")
            )
    expected = {i: (float(CHOSEN[i]), float(REJECTED[i]), float(i in (0, 3))) for i in range(5)}
    assert seen == expected
