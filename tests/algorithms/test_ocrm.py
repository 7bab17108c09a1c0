"""The weights a run makes of log-probs: against enumeration, against the public code's own formula, and at the ends of its knobs."""

import itertools
import json
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxrlhf.algorithms import ocrm
from jaxrlhf.algorithms.ocrm import mean_lengths, weights_of
from jaxrlhf.algorithms.reward_update import Pairs, RoundContext
from jaxrlhf.config import WeightsConfig
from jaxrlhf.data.pairs import Pair
from jaxrlhf.recipe import from_mapping
from jaxrlhf.types import PairBatch


def columns(chosen, rejected):
    return {"chosen_logp": np.asarray(chosen, np.float32), "rejected_logp": np.asarray(rejected, np.float32)}


def test_plain_weights_change_the_sampler_exactly():
    """α = 0, η = 1 over all pairs of all texts of 3 tokens from 3: Σ p_sft w f = Σ p_π f for any f."""
    random = np.random.default_rng(0)
    texts = list(itertools.product(range(3), repeat=3))
    logp = {}
    for name in ("policy", "sft"):
        steps = random.normal(size=(3, 3, 3))  # position, previous token, token
        steps -= np.log(np.exp(steps).sum(-1, keepdims=True))
        logp[name] = np.array([sum(steps[t, text[t - 1] if t else 0, text[t]] for t in range(3)) for text in texts])
    i, j = (index.ravel() for index in np.meshgrid(range(27), range(27)))
    f = random.normal(size=27 * 27)
    weights, report = weights_of(
        columns(logp["policy"][i], logp["policy"][j]), columns(logp["sft"][i], logp["sft"][j]), WeightsConfig(alpha=0.0, eta=1.0)
    )
    old, new = (np.exp(logp[name][i] + logp[name][j]) for name in ("sft", "policy"))
    np.testing.assert_allclose((old * weights * f).sum(), (new * f).sum(), rtol=1e-5)
    np.testing.assert_allclose((old * weights).sum(), 1, rtol=1e-5)
    assert report["pairs"] == 729 and report["eta"] == 1.0 and 1 < report["ess"] < 729


def logps(n=200, spread=8.0):
    random = np.random.default_rng(1)
    sft = [-40 + 5 * random.normal(size=n) for _ in range(2)]
    return columns(*(s + spread * random.normal(size=n) for s in sft)), columns(*sft)


@pytest.mark.parametrize("target", [0.05, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_ess_meets_its_target(target, alpha):
    policy, sft = logps()
    weights, report = weights_of(policy, sft, WeightsConfig(alpha=alpha, eta="ess", ess_target=target))
    share = np.square(weights.astype(np.float64).sum()) / np.square(weights.astype(np.float64)).sum() / len(weights)
    assert report["ess_fraction"] == pytest.approx(share, rel=1e-4)
    # The largest exponent that keeps it; 1 keeps even more where the ratio is bounded (α > 0).
    assert share == pytest.approx(target, rel=0.01) or (report["eta"] == 1.0 and share >= target)


def test_eta_0_gives_exactly_ones():
    for normalize in ("none", "mean"):
        weights, report = weights_of(*logps(), WeightsConfig(alpha=0.1, eta=0.0, normalize=normalize))
        assert weights.dtype == np.float32 and (weights == 1).all() and report["ess_fraction"] == 1


def test_mean_normalisation_changes_the_scale_alone():
    policy, sft = logps()
    plain, _ = weights_of(policy, sft, WeightsConfig(alpha=0.0, eta=0.05))
    scaled, report = weights_of(policy, sft, WeightsConfig(alpha=0.0, eta=0.05, normalize="mean"))
    np.testing.assert_allclose(scaled, plain / plain.mean(), rtol=1e-4)
    assert report["mean"] == pytest.approx(1, rel=1e-4)


# (policy chosen, sft chosen, policy rejected, sft rejected) → the public formula's weight and the exact one, at α = .1 and η = .001.
PUBLIC = [
    ((-60, -60, -60, -60), 1.000, 1.000),
    ((-100, -110, -100, -110), 0.966, 1.0046),
    ((-120, -100, -120, -100), 0.929, 0.961),
    ((-200, -150, -180, -150), 0.807, 0.923),
    ((-300, -120, -300, -120), 0.648, 0.698),
]


@pytest.mark.parametrize(("values", "public", "exact"), PUBLIC)
def test_reference_compat_is_the_public_code_and_the_default_is_exact(values, public, exact):
    policy, sft = columns([values[0]], [values[2]]), columns([values[1]], [values[3]])
    ours, _ = weights_of(policy, sft, WeightsConfig())
    theirs, _ = weights_of(policy, sft, WeightsConfig(reference_compat=True))
    assert ours[0] == pytest.approx(exact, abs=6e-4) and theirs[0] == pytest.approx(public, abs=6e-4)
    by_hand = [np.float64(p) - np.logaddexp(np.log(0.1) + p, np.log(0.9) + s) for p, s in ((values[0], values[1]), (values[2], values[3]))]
    assert ours[0] == pytest.approx(np.exp(0.001 * sum(by_hand)), rel=1e-6)


def stub_pairs(lengths: list[tuple[int, int]]) -> Pairs:
    """Pairs of which only the response lengths matter."""
    longest = max(map(max, lengths))
    chosen, rejected = (np.arange(longest) < np.array([pair[side] for pair in lengths])[:, None] for side in (0, 1))
    n = len(lengths)
    prompt: Any = (np.ones((n, 1), np.int32), np.ones((n, 1), bool))
    sides: Any = (chosen.astype(np.int32), chosen, rejected.astype(np.int32), rejected)
    rows: Any = (np.ones(n, np.float32), np.ones(n, bool), np.arange(n))
    tokens = PairBatch(*prompt, *sides, *rows)
    return Pairs([Pair(str(i), "x", "a", "b", "test") for i in range(n)], tokens)


def test_lengths_of_pairs_by_hand():
    assert mean_lengths(stub_pairs([(1, 1), (3, 2), (4, 0)])).tolist() == [1.0, 2.5, 2.0]


def test_the_update_writes_what_its_weights_are_like(tmp_path, monkeypatch):
    """Log ratios of 0, 1 and 2 nats at lengths 1, 2.5 and 2 with η = 1: known weights, in the report, the file and the figure alike."""
    given = {"policy": columns([-5, -5, -5], [-3, -2, -1]), "sft": columns([-5, -5, -5], [-3, -3, -3])}
    policy, sft = (SimpleNamespace(name=name, tokenizer=None) for name in given)
    asked = []
    monkeypatch.setattr(ocrm, "stored_pair_logps", lambda folder, rows, tokens, model, **how: [asked.append(how), given[model().name]][1])
    read = {"temperature": 0.5, "max_tokens": 7, "batch_size": 3}
    config = from_mapping({"pairs": {"source": "sample"}, "gold": {"kind": "toy"}, "weights": {"alpha": 0.0, "eta": 1.0, **read}})
    context = RoundContext(2, policy, sft, None, None, tmp_path, config, tmp_path, "p", "s")  # type: ignore[arg-type]
    pairs = stub_pairs([(1, 1), (3, 2), (4, 0)])
    same, weights = ocrm.importance_weighted(context, pairs)
    assert same is pairs
    assert [how | read | {"limits": config.data.limits} for how in asked] == asked and len(asked) == 2  # under both models as configured
    np.testing.assert_allclose(weights, np.exp([0, 1, 2]), rtol=1e-6)
    report, health = (json.loads((tmp_path / name).read_text()) for name in ("report.json", "weight_health.json"))
    ess = np.exp([0, 1, 2]).sum() ** 2 / np.exp([0, 2, 4]).sum()
    assert report["ess"] == pytest.approx(ess, rel=1e-5) and health["ess"] == pytest.approx(ess, rel=1e-5)
    assert report["largest_share"] == pytest.approx(np.exp(2) / np.exp([0, 1, 2]).sum(), rel=1e-5) and report["needs_sampler"] is True
    correlation = np.corrcoef([0, 1, 2], [1, 2.5, 2])[0, 1]
    assert report["length_correlation"] == pytest.approx(correlation) and health["length_correlation"] == pytest.approx(correlation)
    assert [row["pairs"] for row in health["by_length"]] == [1, 1, 1]
    assert {"eta", "alpha", "pairs", "ess_fraction", "mean", "min", "max", "q01", "q50", "q99"} < report.keys()
    assert ElementTree.parse(tmp_path / "weight_health.svg").getroot().tag.endswith("svg")
