"""From sampled text to a Rollout: worked by hand, against plain loops, and invariances, on models that are tables."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import token_logp

from jaxrlhf.rollouts.credit import gae_credit, rloo_credit
from jaxrlhf.rollouts.score import Readings, RolloutModels, _by_microbatch, assemble_rollout, has_ended, score_rollout
from jaxrlhf.steps.pair import response_scores
from jaxrlhf.types import Completion, Model, Outputs, PromptBatch, TokenStats

EOS = 2


def ppo(kl_coef=0.1, gamma=1.0, lam=1.0, **options: Any):
    return partial(gae_credit, kl_coef=kl_coef, gamma=gamma, lam=lam, **options)


OPTIONS: dict[str, Any] = {"eos_ids": (EOS,), "credit": ppo()}
SMOOTHED = OPTIONS | {"credit": ppo(lam=0.95)}


def table_lm() -> Model:
    def score_tokens(params, tokens_BL, mask_BL, *, start, temperature=1.0, chunk=None):
        logits = params["table"][tokens_BL[:, start - 1 : -1]]
        p = jax.nn.softmax(logits / temperature)
        return TokenStats(
            token_logp(logits, tokens_BL[:, start:], temperature=temperature), -(p * jnp.log(p)).sum(-1), jnp.log((p * p).sum(-1))
        )

    return Model(None, None, None, None, score_tokens)  # type: ignore[arg-type]


def table_scalar() -> Model:
    """The scalar at a position: the weight of its token plus a hundredth for every token that is not masked so far."""

    def apply(params, tokens_BL, mask_BL, *, start=0):
        return Outputs(scalars=(params["weight"][tokens_BL] + 0.01 * jnp.cumsum(mask_BL, axis=1))[:, start:])

    return Model(None, apply, None, None, None)  # type: ignore[arg-type]


MODELS = RolloutModels(table_lm(), table_lm(), table_scalar(), table_scalar())
PARAMS = {
    "policy": {"table": jax.random.normal(jax.random.key(0), (5, 5))},
    "reference": {"table": jax.random.normal(jax.random.key(1), (5, 5))},
    "critic": {"weight": jnp.array([0.1, 0.2, 0.3, 0.4, 0.5])},
    "reward": {"weight": jnp.array([1.0, 2.0, 3.5, 4.0, 5.0])},
}


def make(rows=8, L=3, T=6, seed=0, filled=0) -> tuple[PromptBatch, Completion]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, T + 1, rows)
    mask = np.arange(T) < lengths[:, None]
    tokens = np.where(mask, random.choice([0, 1, 3, 4], (rows, T)), EOS)  # PAD is EOS
    ends = (lengths < T) | (random.random(rows) < 0.5)
    tokens[np.arange(rows), lengths - 1] = np.where(ends, EOS, 4)
    prompt_mask = np.arange(L) >= random.integers(0, L, rows)[:, None]
    row_mask = np.arange(rows) < rows - filled
    prompts = PromptBatch(*map(jnp.asarray, (random.integers(0, 5, (rows, L)), prompt_mask, row_mask, np.arange(rows))))
    completion = Completion(*map(jnp.asarray, (tokens.astype(np.int32), mask, np.where(mask, -0.7, 0).astype(np.float32))))
    return prompts, completion


score = jax.jit(partial(score_rollout, MODELS, temperature=0.7, **SMOOTHED))


def hand() -> tuple[PromptBatch, Completion, Readings]:
    """Row 0 ends at t = 1 with two positions to spare; row 1 fills all four and has no EOS. NaN wherever nothing may look."""
    nan = np.nan
    prompts = PromptBatch(jnp.ones((2, 1), int), jnp.ones((2, 1), bool), jnp.ones(2, bool), jnp.arange(2))
    completion = Completion(
        jnp.array([[1, EOS, EOS, EOS], [1, 1, 1, 1]]), jnp.array([[True, True, False, False], [True] * 4]), jnp.zeros((2, 4))
    )
    readings = Readings(
        logp_BT=jnp.array([[-1.0, -2.0, nan, nan], [-1.0] * 4]),
        entropy_BT=jnp.array([[1.0, 3.0, nan, nan], [0.5] * 4]),
        reference_logp_BT=jnp.array([[-1.5, -1.0, nan, nan], [-2.0] * 4]),
        values_BT=jnp.array([[0.1, 0.2, 0.3, nan], [0.0, 0.1, 0.2, 0.3]]),
        scores_B=jnp.array([0.75, -0.25]),
    )
    return prompts, completion, readings


def test_by_hand():
    """KL per token .5, −1 and 1, 1, 1, 1; β = .1; the score .75 lands one past EOS, −.25 on the last position for want of room."""
    rollout, metrics = assemble_rollout(*hand(), **OPTIONS)
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    # γ = λ = 1: returns are the rewards still to come, from r = (−.05, .1, .75, 0) and (−.1, −.1, −.1, −.35).
    close(rollout.returns_BT, [[0.8, 0.85, 0.75, 0.0], [-0.65, -0.55, -0.45, -0.35]])
    advantages = np.array([0.7, 0.65, -0.65, -0.65, -0.65, -0.65])  # returns − values where t ≤ len
    white = (advantages - advantages.mean()) / advantages.std()
    close(rollout.advantages_BT, [[*white[:2], 0, 0], white[2:]])
    close(rollout.values_BT, [[0.1, 0.2, 0.3, 0.0], [0.0, 0.1, 0.2, 0.3]])
    assert rollout.value_mask_BT.tolist() == [[True, True, True, False], [True] * 4]
    close(rollout.scores_B, [0.75, -0.25])
    close(rollout.logp_BT, [[-1, -2, 0, 0], [-1] * 4])
    expected = {
        "rollout/score": 0.25, "rollout/score_raw": 0.25, "rollout/kl": (-0.5 + 4) / 2, "kl/penalty": (-0.5 + 4) / 2,
        "rollout/length": 3.0, "rollout/eos_rate": 0.5, "rollout/reward": (0.8 - 0.65) / 2, "rollout/entropy": 1.0,
        "rollout/kl_k3": ((np.exp(-0.5) - 0.5) + (np.exp(1.0) - 2) + 4 * np.exp(-1.0)) / 2,
        "rollout/decode_mismatch": 7 / 6, "rollout/value": (0.6 + 0.6) / 7,
    }  # fmt: skip
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_score_at_eos():
    rollout, _ = assemble_rollout(*hand(), eos_ids=(EOS,), credit=ppo(score_placement="at_eos"))
    np.testing.assert_allclose(rollout.returns_BT, [[0.8, 0.85, 0.0, 0.0], [-0.65, -0.55, -0.45, -0.35]], rtol=1e-6)
    assert rollout.value_mask_BT.tolist() == rollout.mask_BT.tolist()
    assert float(rollout.values_BT[0, 2]) == 0


def test_fractional_and_integer_scores():
    """An integer buffer would turn .75 into 0; integer scores from outside are welcome."""
    prompts, completion, readings = hand()
    for scores in (jnp.array([0.75, -0.25]), jnp.array([3, -1])):
        rollout, metrics = assemble_rollout(
            prompts, completion, readings._replace(scores_B=scores), eos_ids=(EOS,), credit=ppo(kl_coef=0.0)
        )
        assert rollout.returns_BT.dtype == jnp.float32
        np.testing.assert_allclose(rollout.returns_BT[:, 0], scores, rtol=1e-6)
        np.testing.assert_allclose(metrics["rollout/score"], np.mean(scores))


def test_gae_and_whitened_rewards_against_a_plain_loop():
    prompts, completion = make(rows=6)
    random = np.random.default_rng(3)
    logp, entropy, reference, values = jnp.array(random.normal(size=(4, 6, 6)).astype(np.float32))
    readings = Readings(logp, entropy, reference, values, jnp.array(random.normal(size=6)))
    gamma, lam, beta = 0.97, 0.9, 0.3
    rollout, _ = assemble_rollout(
        prompts, completion, readings, eos_ids=(EOS,), credit=ppo(beta, gamma, lam, whiten_rewards=True), kl_estimator="k2"
    )
    mask = np.asarray(completion.mask_BT)
    kl = np.where(mask, (np.asarray(readings.logp_BT) - np.asarray(readings.reference_logp_BT)) ** 2 / 2, 0)
    lengths = mask.sum(axis=1)
    rewards, live = -beta * kl, np.zeros_like(mask)
    for row, n in enumerate(lengths):
        place = n if n < 6 else 5
        rewards[row, place] += float(readings.scores_B[row])
        live[row, : place + 1] = True
    mean, std = rewards[live].mean(), rewards[live].std()
    rewards = np.where(live, (rewards - mean) / std + mean, 0)
    returns, advantages = np.zeros((6, 6)), np.zeros((6, 6))
    for row in range(6):
        values = np.where(live[row], np.asarray(readings.values_BT)[row], 0)
        carry = 0.0
        for t in reversed(range(6)):
            after = values[t + 1] if t < 5 else 0.0
            carry = rewards[row, t] + gamma * after - values[t] + gamma * lam * carry
            advantages[row, t], returns[row, t] = carry, carry + values[t]
    chosen = advantages[mask]
    np.testing.assert_allclose(rollout.returns_BT, np.where(live, returns, 0), atol=1e-5)
    np.testing.assert_allclose(rollout.advantages_BT, np.where(mask, (advantages - chosen.mean()) / chosen.std(), 0), atol=1e-5)


@pytest.mark.parametrize("credit", [ppo(0.3), partial(rloo_credit, kl_coef=0.3, samples=2)], ids=["gae", "rloo"])
def test_the_reported_reward_is_what_each_response_earned_before_whitening(credit):
    """KL −.5 and 4 nats at β = .3: .75 + .15 and −.25 − 1.2. Whitening keeps the batch's mean, so the mean alone could not tell."""
    prompts, completion, readings = hand()
    mask_BT = completion.mask_BT
    kl_BT = jnp.where(mask_BT, readings.logp_BT - readings.reference_logp_BT, 0.0)
    for whiten in (False, True):
        shared = credit(readings.scores_B, kl_BT, readings.values_BT, mask_BT, prompts.row_mask_B, whiten_rewards=whiten)
        np.testing.assert_allclose(shared.rewards_B, [0.9, -1.45], rtol=1e-6)
        _, metrics = assemble_rollout(prompts, completion, readings, eos_ids=(EOS,), credit=partial(credit, whiten_rewards=whiten))
        np.testing.assert_allclose(metrics["rollout/reward"], (0.9 - 1.45) / 2, rtol=1e-6)


def test_missing_eos():
    prompts, completion, readings = hand()
    penalised, metrics = assemble_rollout(prompts, completion, readings, **OPTIONS, missing_eos_penalty=1.5)
    np.testing.assert_allclose(penalised.scores_B, [0.75, -1.75])
    np.testing.assert_allclose([metrics["rollout/score"], metrics["rollout/score_raw"]], [-0.5, 0.25])
    replaced, _ = assemble_rollout(prompts, completion, readings, **OPTIONS, missing_eos_score=-1.0)
    np.testing.assert_allclose(replaced.scores_B, [0.75, -1.0])
    with pytest.raises(ValueError, match="exclude each other"):
        assemble_rollout(prompts, completion, readings, **OPTIONS, missing_eos_score=-1.0, missing_eos_penalty=1.0)
    with pytest.raises(ValueError, match="eos_ids"):
        assemble_rollout(prompts, completion, readings, **dict(OPTIONS, **{"eos_ids": ()}), missing_eos_score=-1.0)


def test_padding_with_eos_does_not_end_a_response():
    tokens = jnp.array([[1, EOS, EOS], [1, 1, EOS], [1, 4, 1]])
    mask = jnp.array([[True, True, False], [True, True, False], [True, True, True]])
    assert has_ended(tokens, mask, (EOS,)).tolist() == [True, False, False]
    assert has_ended(tokens, mask, (EOS, 4)).tolist() == [True, False, True]
    assert not has_ended(tokens, mask, ()).any()


def test_forward_passes_against_loops():
    """Log-probs at the temperature, values before each token, scores at the last response token, all read row by row."""
    prompts, completion = make()
    params = {**PARAMS, "sft": {"table": jax.random.normal(jax.random.key(2), (5, 5))}}
    models = MODELS._replace(sft=table_lm())
    options = SMOOTHED | {"reward_bias": 0.25, "value_bias": 0.5, "temperature": 0.7}
    rollout, metrics = jax.jit(partial(score_rollout, models, **options))(params, prompts, completion)
    kl_sft = []
    for row in range(8):
        tokens = np.concatenate([prompts.prompt_BL[row], completion.tokens_BT[row]])
        mask = np.concatenate([prompts.prompt_mask_BL[row], completion.mask_BT[row]])
        n = int(completion.mask_BT[row].sum())
        seen = 0.01 * np.cumsum(mask)
        for t in range(n):
            for name, got in (("policy", rollout.logp_BT), ("reference", rollout.reference_logp_BT)):
                logits = np.asarray(PARAMS[name]["table"])[tokens[2 + t]] / 0.7
                np.testing.assert_allclose(got[row, t], logits[tokens[3 + t]] - np.log(np.exp(logits).sum()), rtol=1e-5)
        for t in range(min(n + 1, 6)):  # one more value than tokens, where there is room
            value = PARAMS["critic"]["weight"][tokens[2 + t]] + seen[2 + t] - 0.5
            np.testing.assert_allclose(rollout.values_BT[row, t], value, rtol=1e-4)
        np.testing.assert_allclose(rollout.scores_B[row], PARAMS["reward"]["weight"][tokens[2 + n]] + seen[2 + n] - 0.25, rtol=1e-5)
        logits = np.asarray(params["sft"]["table"])[tokens[2 : 2 + n]] / 0.7
        logp = logits[np.arange(n), tokens[3 : 3 + n]] - np.log(np.exp(logits).sum(axis=1))
        kl_sft.append(float(rollout.logp_BT[row, :n].sum()) - logp.sum())
    np.testing.assert_allclose(metrics["kl/sft"], np.mean(kl_sft), rtol=1e-5)
    np.testing.assert_allclose(metrics["rollout/score"], np.mean(rollout.scores_B), rtol=1e-6)
    apart = np.abs(np.asarray(rollout.logp_BT) - completion.logp_BT)[np.asarray(completion.mask_BT)]
    np.testing.assert_allclose(metrics["rollout/decode_mismatch"], apart.mean(), rtol=1e-5)


def test_rows_that_fill_the_batch_count_nowhere():
    """The live rows alone give the same rollout and metrics; garbage in the filling rows changes no bit."""
    prompts, completion = make(filled=3)
    rollout, metrics = score(PARAMS, prompts, completion)
    alone, alone_metrics = score(PARAMS, *jax.tree.map(lambda x: x[:5], (prompts, completion)))
    for name, value in alone_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    for left, right in zip(jax.tree.leaves(rollout), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(left[:5], right, rtol=1e-5, atol=1e-6)
    assert not rollout.mask_BT[5:].any() and not rollout.value_mask_BT[5:].any()
    for array in (rollout.advantages_BT, rollout.returns_BT, rollout.values_BT, rollout.scores_B, rollout.logp_BT):
        assert not array[5:].any()
    empty = replace(completion, mask_BT=completion.mask_BT.at[5:].set(False), logp_BT=completion.logp_BT.at[5:].set(jnp.nan))
    again, again_metrics = score(PARAMS, prompts, empty)
    assert all(np.array_equal(metrics[name], again_metrics[name]) for name in metrics)
    assert np.array_equal(again.advantages_BT, rollout.advantages_BT)


def test_microbatch_changes_nothing():
    prompts, completion = make()
    whole = score(PARAMS, prompts, completion)
    for size in (2, 4, 99):
        parts = jax.jit(partial(score_rollout, MODELS, temperature=0.7, microbatch=size, **SMOOTHED))(PARAMS, prompts, completion)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), parts, whole)
    with pytest.raises(ValueError, match="microbatch 3 does not divide 8 rows; try 2"):
        score_rollout(MODELS, PARAMS, prompts, completion, temperature=0.7, microbatch=3, **OPTIONS)


@pytest.mark.parametrize(("size", "devices", "share"), [(4, 2, 2), (2, 4, 1), (16, 2, 8)])
def test_each_of_several_devices_takes_its_share_of_a_microbatch(size, devices, share):
    seen = []
    again = _by_microbatch(lambda rows: [seen.append(len(rows)), rows][1], jnp.arange(8), size, devices)
    assert set(seen) == {share} and again.tolist() == list(range(8))


def test_every_model_keeps_to_the_microbatch():
    rows = []

    def watched(model):
        def watch(function):
            return function and (
                lambda params, tokens, *rest, **options: (rows.append(len(tokens)), function(params, tokens, *rest, **options))[1]
            )

        return Model(*map(watch, model))

    models = RolloutModels(*(watched(model) for model in (*MODELS[:4], table_lm())))
    score_rollout(models, {**PARAMS, "sft": PARAMS["reference"]}, *make(), temperature=0.7, microbatch=2, **OPTIONS)
    assert rows == [2] * 5


def test_sampler_logp_saves_the_forward_pass():
    prompts, completion = make()

    def never(*_, **__):
        raise AssertionError("the policy was run")

    models = MODELS._replace(policy=MODELS.policy._replace(score_tokens=never))
    rollout, metrics = score_rollout(models, PARAMS, prompts, completion, temperature=0.7, old_logp="sampler", **OPTIONS)
    np.testing.assert_array_equal(rollout.logp_BT, completion.logp_BT)
    assert "rollout/decode_mismatch" not in metrics and "rollout/entropy" not in metrics
    with pytest.raises(ValueError, match="old_logp"):
        score_rollout(MODELS, PARAMS, prompts, completion, temperature=0.7, old_logp="both", **OPTIONS)  # type: ignore[arg-type]


def test_scores_come_from_one_place():
    prompts, completion = make()
    given = jnp.arange(8) / 8
    rollout, _ = score_rollout(MODELS._replace(reward=None), PARAMS, prompts, completion, scores_B=given, temperature=0.7, **OPTIONS)
    np.testing.assert_array_equal(rollout.scores_B, given)
    for models, scores in ((MODELS, given), (MODELS._replace(reward=None), None)):
        with pytest.raises(ValueError, match="exactly one place"):
            score_rollout(models, PARAMS, prompts, completion, scores_B=scores, temperature=0.7, **OPTIONS)


def test_without_a_critic_returns_are_what_is_still_to_come():
    prompts, completion = make()
    rollout, _ = score_rollout(MODELS._replace(critic=None), PARAMS, prompts, completion, temperature=0.7, **OPTIONS)
    assert not rollout.values_BT.any()
    kl = (rollout.logp_BT - rollout.reference_logp_BT).sum(axis=1)
    np.testing.assert_allclose(rollout.returns_BT[:, 0], rollout.scores_B - 0.1 * kl, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
def test_kl_is_zero_for_equal_models_at_every_temperature(temperature):
    prompts, completion = make()
    same = PARAMS | {"reference": PARAMS["policy"]}
    rollout, metrics = score_rollout(MODELS, same, prompts, completion, temperature=temperature, **OPTIONS)
    assert float(metrics["kl/penalty"]) == 0 and float(metrics["rollout/kl_k3"]) == 0
    assert np.array_equal(rollout.logp_BT, rollout.reference_logp_BT)


def test_pmap_whitens_and_counts_over_all_devices():
    """Two devices of four rows each, unequal lengths and filling rows on one of them, give the single-device rollout."""
    prompts, completion = make(filled=3)
    whole, whole_metrics = score(PARAMS, prompts, completion)
    inner = partial(score_rollout, MODELS, temperature=0.7, axis_name="data", **SMOOTHED)
    cut = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), (prompts, completion))
    rollout, metrics = jax.pmap(inner, "data", in_axes=(None, 0, 0), devices=jax.devices()[:2])(PARAMS, *cut)
    joined = jax.tree.map(lambda x: np.asarray(x).reshape(8, *x.shape[2:]), rollout)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), joined, whole)
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(metrics[name], [value, value], rtol=1e-5, atol=1e-6, err_msg=name)


def test_reward_of_an_empty_response_is_zero():
    prompts, completion = make(rows=2)
    scores = response_scores(
        table_scalar(), PARAMS["reward"], prompts.prompt_BL, prompts.prompt_mask_BL, completion.tokens_BT, completion.mask_BT & False, 3.0
    )
    assert scores.tolist() == [0.0, 0.0]


def test_rloo_by_hand():
    """KL −.5 and 4 over the two responses to one prompt, β = .1; the second has no EOS and loses 1.5: R = .8 and −2.15."""
    options = {"credit": partial(rloo_credit, kl_coef=0.1, samples=2), "missing_eos_penalty": 1.5}
    rollout, metrics = assemble_rollout(*hand(), eos_ids=(EOS,), **options)
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    close(rollout.advantages_BT, [[2.95, 2.95, 0, 0], [-2.95] * 4])
    close(rollout.returns_BT, [[0.8, 0.8, 0, 0], [-2.15] * 4])
    assert rollout.value_mask_BT.tolist() == rollout.mask_BT.tolist() and not rollout.values_BT.any()
    close(metrics["rollout/reward"], (0.8 - 2.15) / 2)
    close([metrics["rollout/score"], metrics["rollout/score_raw"], metrics["kl/penalty"]], [-0.5, 0.25, 1.75])


def test_whitened_returns_of_rloo_keep_their_mean():
    """Scores 0 and 4, mean 2 and deviation 2."""
    rows, mask = jnp.ones(2, bool), jnp.ones((2, 1), bool)
    given = (jnp.array([0.0, 4.0]), jnp.zeros((2, 1)), jnp.zeros((2, 1)), mask, rows)
    credit = rloo_credit(*given, kl_coef=0.1, samples=2, whiten_rewards=True)
    np.testing.assert_allclose(credit.returns_BT, [[1.0], [3.0]], rtol=1e-6)
    np.testing.assert_allclose(credit.advantages_BT, [[-2.0], [2.0]], rtol=1e-6)


@pytest.mark.parametrize("microbatch", [None, 2])
def test_ensemble_against_a_loop(microbatch):
    """Each member less its own bias; mean less the population deviation; the critic reads one model as before."""
    prompts, completion = make(filled=2)
    members = tuple({"weight": PARAMS["reward"]["weight"] * scale + shift} for scale, shift in ((1.0, 0.0), (-0.5, 1.0), (2.0, 3.0)))
    biases, coef = (0.5, 0.25, -1.0), 0.7
    params = PARAMS | {"reward": members}
    options = {"temperature": 0.7, "spread_coef": coef, "microbatch": microbatch, **OPTIONS}
    rollout, metrics = jax.jit(partial(score_rollout, MODELS, **options))(params, prompts, completion, reward_bias=biases)
    spreads = []
    for row in range(6):
        n = int(completion.mask_BT[row].sum())
        last, seen = int(completion.tokens_BT[row, n - 1]), 0.01 * (int(prompts.prompt_mask_BL[row].sum()) + n)
        said = [float(member["weight"][last]) + seen - bias for member, bias in zip(members, biases, strict=True)]
        mean = sum(said) / 3
        spreads.append((sum((x - mean) ** 2 for x in said) / 3) ** 0.5)
        np.testing.assert_allclose(rollout.scores_B[row], mean - coef * spreads[-1], rtol=1e-5)
    np.testing.assert_allclose(metrics["reward/ensemble_spread"], np.mean(spreads), rtol=1e-5)
    with pytest.raises(ValueError, match="3 reward models has 2 biases"):
        score_rollout(MODELS, params, prompts, completion, reward_bias=biases[:2], **options)


def test_two_members_that_agree_are_one_to_the_bit():
    prompts, completion = make(filled=2)
    one, _ = score(PARAMS, prompts, completion)
    twins = PARAMS | {"reward": (PARAMS["reward"],) * 2}
    options = {"temperature": 0.7, "spread_coef": 1.0, "reward_bias": (0.0, 0.0), **SMOOTHED}
    two, metrics = jax.jit(partial(score_rollout, MODELS, **options))(twins, prompts, completion)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert float(metrics["reward/ensemble_spread"]) == 0
