"""Against transformers, through tests/golden/models.json (made by make_models.py), and against stories260K's own reference."""

import json

import jax
import numpy as np
import pytest
import tiny_models

from jaxrlhf import models
from jaxrlhf.models.rope import RopeScaling, inverse_frequencies

GOLDEN = json.loads(tiny_models.GOLDEN.read_text())


def folder_of(name, kind, path):
    return tiny_models.write_folder(path / f"{name}-{kind}", tiny_models.VARIANTS[name], GOLDEN["models"][name]["shapes"][kind])


def assert_rows_equal(logits_BTV, mask_BT, expected):
    largest = max(abs(value) for row in expected for position in row for value in position)
    for row, wanted in enumerate(expected):
        np.testing.assert_allclose(np.asarray(logits_BTV[row])[mask_BT[row]], wanted, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("name", tiny_models.VARIANTS)
def test_logits_equal_transformers_on_ragged_rows(name, tmp_path):
    loaded = models.load(folder_of(name, "lm", tmp_path))
    apply = jax.jit(loaded.model.apply)
    for side in ("left", "right"):
        tokens, mask = tiny_models.padded(side)
        assert_rows_equal(apply(loaded.params, tokens, mask).logits, mask, GOLDEN["models"][name]["logits"])


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox-old-spelling", "llama-3.1-rope", "qwen3"])
def test_scores_equal_sequence_classification(name, tmp_path):
    loaded = models.load(folder_of(name, "scalar", tmp_path), head="scalar")
    tokens, mask = tiny_models.padded("right")
    scalars = np.asarray(loaded.model.apply(loaded.params, tokens, mask).scalars)
    last = mask.sum(1) - 1
    np.testing.assert_allclose(scalars[np.arange(3), last], GOLDEN["models"][name]["scores"], rtol=1e-4, atol=1e-5)


def test_llama3_frequencies_at_the_real_models_settings():
    ours = inverse_frequencies(128, 500000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    np.testing.assert_allclose(ours, GOLDEN["llama3_inverse_frequencies"], rtol=1e-6)


@pytest.fixture(scope="module")
def stories(real_data):
    folder = real_data / "models" / "stories260K"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("JAXRLHF_DATA holds no models/stories260K")
    return models.load(folder), json.loads((folder / "golden.json").read_text())


def test_stories260k_log_probs_and_logits(stories):
    loaded, golden = stories
    ids = np.asarray([golden["ids"]])
    mask = np.ones_like(ids, bool)
    stats = loaded.model.score_tokens(loaded.params, ids, mask, start=1)
    expected = np.asarray(golden["token_logprobs"])
    np.testing.assert_allclose(stats.logp_BT[0], expected, atol=5e-5)
    assert -float(stats.logp_BT.mean()) == pytest.approx(golden["mean_nll"], abs=1e-5)
    logits = np.asarray(loaded.model.apply(loaded.params, ids, mask).logits[0])
    np.testing.assert_allclose(logits[0, :8], golden["logits_pos0_first8"], rtol=1e-4, atol=1e-4)


def test_stories260k_greedy_decoding_by_cache(stories):
    loaded, golden = stories
    ids = golden["ids"]
    logits, cache = loaded.model.prefill(loaded.params, np.asarray([ids[:1]]), np.ones((1, 1), bool), length=len(ids))
    decode = jax.jit(loaded.model.decode)
    produced = [int(logits[0].argmax())]
    while len(produced) < len(ids) - 1:
        logits, cache = decode(loaded.params, np.asarray(produced[-1:]), cache)
        produced.append(int(logits[0].argmax()))
    assert produced == ids[1:]
    text = loaded.tokenizer.decode(ids[1:], skip_special_tokens=True).strip()
    assert text == golden["text"].strip()
