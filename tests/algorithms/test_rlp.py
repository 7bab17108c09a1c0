"""RLP-SPG end to end on tiny models: which pairs are added, what they are made of, and that neither batch size nor mesh changes them."""

import dataclasses
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_encoder import write_tiny_bert  # pyright: ignore[reportMissingImports]

from jaxrlhf import rng, sharding
from jaxrlhf.algorithms.reward_update import Pairs, RoundContext
from jaxrlhf.algorithms.rlp import SAMPLES, sampled, synthetic
from jaxrlhf.config import Config, DataConfig, EncoderConfig, LimitsConfig, PPOConfig, SynthesizeConfig
from jaxrlhf.data.pairs import Pair, Prompt
from jaxrlhf.data.tables import read_pair_table, read_table, unpadded, write_pair_table
from jaxrlhf.data.tokens import Limits, eos_ids_of, pad_id_of, tokenize_pairs
from jaxrlhf.data.toy import toy_tokenizer
from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.hub import initialise, with_reward_bias
from jaxrlhf.offline import embed, vectors
from jaxrlhf.scorers.reward_model import score_responses
from jaxrlhf.types import TextBatch

L, T, S, n = 6, 3, 5, 6  # prompt and response limits of the data, response length and samples of the policy
PROMPTS = [
    Prompt(f"p{i}", text, f"prompts:{i}") for i, text in enumerate(["farmers sold apples", "well", "nurses hid maps ashore late", "late"])
]
OFFLINE = [
    Pair("a", "farmers sold apples", "farmers sold .", "apples .", "pairs:1", 0.5),
    Pair("synthetic-r2-p0", "nurses hid", "nurses .", "hid .", "pairs:2"),
]
TOKENIZER = toy_tokenizer()
EOS = eos_ids_of(TOKENIZER)[0]


def model(head, seed):
    shape = {"family": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    config, _ = config_from_shape(shape, len(TOKENIZER), max_positions=32, pad_id=pad_id_of(TOKENIZER), eos_id=EOS)
    return initialise(config, key=jax.random.key(seed), tokenizer=TOKENIZER, head=head)


def talkative(policy):
    """A policy of few words: every logit but those of four words and EOS is pushed far down, so that meanings repeat."""
    words = TOKENIZER("farmers nurses sold .", add_special_tokens=False)["input_ids"]
    bias = np.full(len(TOKENIZER), -1e9, np.float32)
    bias[[*words, EOS]] = 0

    def shifted(function):
        def call(*args, **kwargs):
            logits, cache = function(*args, **kwargs)
            return logits + bias, cache

        return call

    return policy._replace(model=policy.model._replace(prefill=shifted(policy.model.prefill), decode=shifted(policy.model.decode)))


@pytest.fixture(scope="module")
def models():
    return talkative(model("lm", 0)), with_reward_bias(model("scalar", 1), 0.25)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    words = sorted(word for word in TOKENIZER.get_vocab() if word.isalpha())  # its own order is another in every process
    at = tmp_path_factory.mktemp("encoders")
    return write_tiny_bert(at / "encoder", words), write_tiny_bert(at / "nli", words, classifier=True)


@pytest.fixture
def pairs():
    tokens, report = tokenize_pairs(OFFLINE, TOKENIZER, Limits(L, T), eos_ids=eos_ids_of(TOKENIZER))
    assert report.kept == 2
    return Pairs(OFFLINE, tokens)


@pytest.fixture
def context(models, folders, tmp_path):
    def make(*, round=2, mesh=None, prompts=PROMPTS, **section):
        folder = tmp_path / f"update-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        section = {"num_samples": n, "num_prompts": 3, "confidence": 0.3, "similarity": 0.95, "batch_size": 4} | section
        config = Config(
            data=DataConfig(limits=LimitsConfig(max_prompt_length=L, max_response_length=T)),
            ppo=PPOConfig(response_length=S),
            encoder=EncoderConfig(source=str(folders[0]), backend="flax", batch_size=8),
            synthesize=SynthesizeConfig(**section),
        )
        return RoundContext(
            round, models[0], models[0], models[1], rng.stream(jax.random.key(0), "update", round), folder, config, tmp_path / "columns",
            "policy", "sft", mesh, prompts=lambda: prompts,
        )  # fmt: skip

    return make


def report_of(context):
    return json.loads((context.folder / "report.json").read_text())


def responses_of(table: TextBatch):
    return unpadded(table.response_BT, table.response_mask_BT)  # type: ignore[arg-type]


def test_what_is_embedded_is_kept(context, pairs, monkeypatch):
    """Another attempt at the round, or another arm, loads no encoder."""
    first = synthetic(context(), pairs)
    for module in (vectors, embed):
        monkeypatch.setattr(module, "open_encoder", lambda *_, **how: pytest.fail("embedded again"))
    assert synthetic(context(), pairs)[0].rows == first[0].rows


def test_pairs_are_added_as_they_were_drawn(context, pairs):
    """Everything that is claimed of D ∪ D̂ is recomputed from the samples and from synthetic.parquet."""
    here = context()
    both, weights = synthetic(here, pairs)
    drawn, report = sampled(here), report_of(here)
    made = len(both.rows) - 2
    assert made >= 2 and report["synthetic_pairs"] == made and report["prompts"] == 3 and weights.dtype == np.float32
    np.testing.assert_array_equal(weights, np.ones(made + 2))
    # The offline pairs stay what they are.
    assert both.rows[:2] == OFFLINE
    for name in ("prompt", "chosen", "rejected"):
        suffix = "BL" if name == "prompt" else "BT"
        given, kept = (unpadded(getattr(t, f"{name}_{suffix}"), getattr(t, f"{name}_mask_{suffix}")) for t in (pairs.tokens, both.tokens))
        assert kept[:2] == given
    np.testing.assert_array_equal(both.tokens.columns["margin"], [0.5] + [0] * (made + 1))
    assert both.tokens.chosen_BT.shape[1] <= S and len(set(both.ids)) == len(both.ids)
    # Winner and loser are what the sampler drew, token for token.
    tokens = responses_of(drawn.table)
    columns, _ = read_table(here.folder / SAMPLES)
    assert columns["id"] == [p.id for p in drawn.prompts for _ in range(n)]
    chosen, rejected = (
        unpadded(getattr(both.tokens, f"{side}_BT"), getattr(both.tokens, f"{side}_mask_BT"))[2:] for side in ("chosen", "rejected")
    )
    assert [tokens[i] for i, side in enumerate(columns["side"]) if side == "chosen"] == chosen
    assert [tokens[i] for i, side in enumerate(columns["side"]) if side == "rejected"] == rejected
    assert [columns["response"][i] for i, side in enumerate(columns["side"]) if side == "chosen"] == [row.chosen for row in both.rows[2:]]
    assert [columns["response"][i] for i, side in enumerate(columns["side"]) if side == "rejected"] == [r.rejected for r in both.rows[2:]]
    assert any(len(row) > T for row in chosen + rejected)  # longer than the data's responses, and kept whole
    # The winner is the best of its prompt's largest cluster by the old reward model, less its bias.
    reward = here.reward
    scores = score_responses(reward.model, reward.params, drawn.table, batch_size=2, bias=0.25)
    given = [(i, score) for i, score in enumerate(columns["score"]) if score is not None]
    assert len(given) == made * n
    np.testing.assert_allclose([score for _, score in given], scores[[i for i, _ in given]], rtol=1e-4, atol=1e-6)
    for p in range(3):
        rows = range(p * n, p * n + n)
        clusters = [columns["cluster"][i] for i in rows]
        largest = max(set(clusters), key=lambda c: (clusters.count(c), -c))
        assert columns["confidence"][p * n] == clusters.count(largest) / n
        for i in rows:
            if columns["side"][i] == "chosen":
                assert columns["cluster"][i] == largest
                assert scores[i] == max(scores[j] for j in rows if columns["cluster"][j] == largest)
            if columns["side"][i] == "rejected":
                assert columns["cluster"][i] != largest
    assert report["confidence"] == pytest.approx(np.mean(columns["confidence"]))
    assert report["synthetic_share"] == made / (made + 2)
    assert sum(report["clusters_per_prompt"].values()) == 3 and 0 <= report["old_reward_agrees"] <= 1


def test_ids_are_free_and_the_table_survives_the_disk(context, pairs, tmp_path):
    both, _ = synthetic(context(confidence=0.1), pairs)
    assert both.ids == ["a", "synthetic-r2-p0", "synthetic-r2-p0-1", "synthetic-r2-p1", "synthetic-r2-p2"]
    assert [row.source for row in both.rows[2:]] == ["prompts:0", "prompts:1", "prompts:2"]
    write_pair_table(tmp_path / "pairs.parquet", both.rows, both.tokens, pad_id=pad_id_of(TOKENIZER))
    rows, tokens = read_pair_table(tmp_path / "pairs.parquet")
    assert rows == both.rows
    jax.tree.map(np.testing.assert_array_equal, tokens, both.tokens)


def test_batch_size_and_mesh_change_no_pair(context, pairs):
    """Scores may differ in their last bits; which pairs are made may not."""
    (first, _), (again, _) = synthetic(context(), pairs), synthetic(context(), pairs)
    (larger, _), (meshed, _) = synthetic(context(batch_size=16), pairs), synthetic(context(mesh=sharding.make_mesh(4)), pairs)
    for other in (again, larger, meshed):
        assert other.rows == first.rows
        jax.tree.map(np.testing.assert_array_equal, other.tokens, first.tokens)


def test_prompts_go_on_from_round_to_round_and_start_again(context):
    asked = {round: [p.id for p in sampled(context(round=round)).prompts] for round in (2, 3, 4)}
    assert asked == {2: ["p0", "p1", "p2"], 3: ["p3", "p0", "p1"], 4: ["p2", "p3", "p0"]}
    assert sampled(context()).texts[0] != sampled(context(round=3)).texts[1]  # p0 again, with other random numbers
    assert [p.id for p in sampled(context(num_prompts=9)).prompts] == ["p0", "p1", "p2", "p3"]  # none twice in a round
    long = [Prompt("long", " ".join(["well"] * (L + 3)), "prompts:9"), *PROMPTS]
    assert [p.id for p in sampled(context(prompts=long)).prompts] == ["p0", "p1", "p2"]  # the run's limits hold


def test_samples_of_a_prompt_differ(context):
    texts = sampled(context()).texts
    assert all(len(row) == n and len(set(row)) > 1 for row in texts)


def test_one_meaning_gives_no_pair(context, pairs, caplog):
    """Where every response means the same, nothing is preferred, and the offline pairs are handed back as they are."""
    here = context(similarity=-1.0)
    both, weights = synthetic(here, pairs)
    assert both is pairs and weights.tolist() == [1, 1]
    report = report_of(here)
    assert report["single_cluster"] == report["kept"] == report["prompts"] == 3 and report["confidence"] == 1
    assert report["synthetic_pairs"] == 0 and report["synthetic_share"] == 0 and report["clusters_per_prompt"] == {"1": 3}
    assert "no prompt gives a synthetic pair" in caplog.text


def test_confidence_keeps_the_surer_prompts(context, pairs):
    counts = []
    for confidence in (0.1, 0.3, 0.5, 1.0):
        here = context(confidence=confidence, similarity=0.99)
        both, _ = synthetic(here, pairs)
        shares = read_table(here.folder / SAMPLES)[0]["confidence"][::n]
        counts.append(report_of(here)["kept"])
        assert counts[-1] == sum(share >= confidence for share in shares)
        assert len(both.rows) - 2 == sum(confidence <= share < 1 for share in shares)
    assert counts == sorted(counts, reverse=True) and counts[0] == 3 and counts[-1] < 3


def test_entailment_and_what_was_used_is_recorded(context, folders, pairs):
    here = context(nli=str(folders[1]), confidence=0.1)
    both, weights = synthetic(here, pairs)
    report = report_of(here)
    assert report["clusters"] == "nli" and report["nli"]["source"] == str(folders[1]) and report["prompts_cut"] == 0
    assert report["nli"]["labels"] == ["contradiction", "entailment", "neutral"] and len(report["nli"]["files"]) == 20
    assert len(weights) == len(both.rows) > 2
    plain = context()
    synthetic(plain, pairs)
    other = report_of(plain)
    assert other["clusters"] == "embeddings" and other["encoder"]["backend"] == "flax" and "nli" not in other
    assert other["encoder"]["files"] != report["nli"]["files"]


def test_columns_nobody_can_fill_are_refused_before_anything_is_sampled(context, pairs):
    tokens = replace(pairs.tokens, columns={"mine": np.ones(2, np.float32)})
    here = dataclasses.replace(context(), prompts=None)
    with pytest.raises(ValueError, match="column 'mine'"):
        synthetic(here, Pairs(OFFLINE, tokens))
