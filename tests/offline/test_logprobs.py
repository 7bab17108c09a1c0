"""Sequence log-probs: against a plain loop over logits, in batches that do not fit, cut to the first tokens, and from disk."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.config import LimitsConfig
from jaxrlhf.data.columns import ColumnError, cached_columns, write_columns
from jaxrlhf.data.pairs import Pair
from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.model import build_model
from jaxrlhf.offline import logprobs
from jaxrlhf.offline.logprobs import NAMES, pair_logps, response_logps, stored_pair_logps
from jaxrlhf.types import PairBatch, TextBatch

N, L, T, V = 7, 3, 4, 11


@pytest.fixture(scope="module")
def model():
    config, _ = config_from_shape({"family": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 2}, V, max_positions=L + T)
    built = build_model(config)
    return built, built.init(jax.random.key(0))


@pytest.fixture(scope="module")
def table():
    random = np.random.default_rng(0)
    prompt_mask = np.arange(L) >= random.integers(0, L, (N, 1))
    masks = [np.arange(T) < random.integers(1, T + 1, (N, 1)) for _ in range(2)]
    tokens = [random.integers(0, V, (N, T)).astype(np.int32) for _ in range(2)]
    prompt = random.integers(0, V, (N, L)).astype(np.int32)
    ones = np.ones(N, np.float32)
    return PairBatch(prompt, prompt_mask, tokens[0], masks[0], tokens[1], masks[1], ones, ones > 0, np.arange(N))  # type: ignore[arg-type]


def test_against_a_plain_loop_whatever_the_batch(model, table):
    built, params = model
    texts = TextBatch(table.prompt_BL, table.prompt_mask_BL, table.chosen_BT, table.chosen_mask_BT, table.row_mask_B, table.index_B)
    got = response_logps(built, params, texts, temperature=0.7, batch_size=4)
    tokens, mask = (np.concatenate(p, axis=1) for p in ((table.prompt_BL, table.chosen_BT), (table.prompt_mask_BL, table.chosen_mask_BT)))
    logits = np.asarray(jax.jit(built.apply)(params, tokens, mask).logits, np.float64) / 0.7
    for b in range(N):
        steps = [logits[b, t - 1, tokens[b, t]] - np.log(np.exp(logits[b, t - 1]).sum()) for t in range(L, L + T) if mask[b, t]]
        assert got[b] == pytest.approx(sum(steps), rel=1e-4, abs=1e-4)
    on_mesh = response_logps(built, params, texts, temperature=0.7, batch_size=6, mesh=sharding.make_mesh(4))
    np.testing.assert_allclose(on_mesh, got, rtol=1e-4, atol=1e-5)


def test_first_tokens_alone(model, table):
    built, params = model
    whole = pair_logps(built, params, table, temperature=0.7, batch_size=4)
    reported = []
    cut = pair_logps(
        built, params, table, temperature=0.7, batch_size=4, max_tokens=2, progress=lambda done, total: reported.append((done, total))
    )
    assert reported[0] == (0, 4) and sorted(set(reported)) == [(done, 4) for done in range(5)]  # both sides are one pass
    short = np.asarray(table.chosen_mask_BT).sum(axis=1) <= 2
    np.testing.assert_allclose(cut["chosen_logp"][short], whole["chosen_logp"][short], rtol=1e-4, atol=1e-5)
    assert (cut["chosen_logp"][~short] > whole["chosen_logp"][~short]).all() and short.any() and not short.all()


def test_all_that_moves_a_log_prob_names_another_column(tmp_path, table, monkeypatch):
    """Arms of a run share the folder: what is left out of the name gives one arm another's numbers. The batch size moves nothing."""
    monkeypatch.setattr(logprobs, "tokenizer_fingerprint", lambda tokenizer: tokenizer)
    computed = []

    def compute(*_, **read):
        computed.append(read)
        return {name: np.zeros(N, np.float32) for name in NAMES}

    monkeypatch.setattr(logprobs, "pair_logps", compute)
    rows = [Pair(str(n), "x", "a", "b", "test") for n in range(N)]
    given = {
        "rows": rows, "model_hash": "m", "tokenizer": "t", "limits": LimitsConfig(), "temperature": 1.0, "max_tokens": None,
        "batch_size": 4,
    }  # fmt: skip
    others = {
        "rows": [*rows[:-1], replace(rows[-1], chosen="c")], "model_hash": "n", "tokenizer": "u",
        "limits": LimitsConfig(max_response_length=3), "temperature": 0.7, "max_tokens": 2,
    }  # fmt: skip
    for change in ({}, *({name: value} for name, value in others.items())):
        for again in (given | change, given | change | {"batch_size": 2}):
            stored_pair_logps(tmp_path, tokens=table, model=lambda: SimpleNamespace(model=None, params=None), **again)
        read = {name: (given | change)[name] for name in ("temperature", "max_tokens", "batch_size")}
        assert computed == [read], f"a change of {list(change)} took over the columns computed before it"
        computed.clear()


def test_computed_once_and_never_taken_for_another(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"chosen_logp": np.array([-1.0, -2.0], np.float32), "rejected_logp": np.array([-3.0, -4.0], np.float32)}

    header = {"model": "m", "temperature": 1.0}
    first = cached_columns(tmp_path / "columns", ["a", "b"], NAMES, header, compute)
    again = cached_columns(tmp_path / "columns", ["b", "a"], NAMES, header, compute)  # joined by id, not by place
    assert calls == [1] and again["chosen_logp"].tolist() == first["chosen_logp"].tolist()[::-1]
    with pytest.raises(ColumnError, match=r"temperature"):
        cached_columns(tmp_path / "columns", ["a", "b"], NAMES, header | {"temperature": 0.7}, compute)


def test_two_processes_at_once(tmp_path):
    """The second to finish reads what the first wrote, under the same checks; an error of its own stays one."""
    folder, header = tmp_path / "columns", {"model": "m"}
    columns = {name: np.array([-1.0], np.float32) for name in ("chosen_logp", "rejected_logp")}

    def overtaken(by):
        write_columns(folder, ["a"], {name: 2 * values for name, values in columns.items()}, by)
        return columns

    found = cached_columns(folder, ["a"], NAMES, header, lambda: overtaken(header))
    assert found["chosen_logp"].tolist() == [-2.0]
    folder = tmp_path / "other"
    with pytest.raises(ColumnError, match="model"):
        cached_columns(folder, ["a"], NAMES, header, lambda: overtaken({"model": "n"}))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        cached_columns(tmp_path / "file" / "columns", ["a"], NAMES, header, lambda: columns)
