"""FRFT's updates on tiny models: what is asked, compared, cached and kept, recomputed from what was written."""

import json

import jax
import numpy as np
import pytest
from tiny_encoder import write_tiny_bert  # pyright: ignore[reportMissingImports]

from jaxrlhf import rng
from jaxrlhf.algorithms import frft
from jaxrlhf.algorithms.frft import nearest, random_subset
from jaxrlhf.algorithms.reward_update import Pairs, RoundContext
from jaxrlhf.config import Config, DataConfig, EncoderConfig, FilterConfig, LimitsConfig, PPOConfig
from jaxrlhf.data.pairs import Pair, Prompt
from jaxrlhf.data.tokens import Limits, eos_ids_of, pad_id_of, tokenize_pairs
from jaxrlhf.data.toy import toy_tokenizer
from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.hub import initialise
from jaxrlhf.offline.embed import embed_texts

TOKENIZER = toy_tokenizer()
WORDS = sorted(word for word in TOKENIZER.get_vocab() if word.isalpha())  # its own order is another in every process
PROMPTS = [Prompt(f"p{i}", f"{a} {b}", f"prompts:{i}") for i, (a, b) in enumerate(zip(WORDS[:9], WORDS[9:18], strict=True))]
# Ten pairs over five prompts: two a prompt.
OFFLINE = [Pair(f"id{i}", f"{WORDS[i % 5]} sold", f"{WORDS[i + 3]} {WORDS[20 + i]}", f"{WORDS[2 * i]}", f"pairs:{i}") for i in range(10)]


@pytest.fixture(scope="module")
def policies():
    shape = {"family": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    config, _ = config_from_shape(shape, len(TOKENIZER), max_positions=32, pad_id=pad_id_of(TOKENIZER), eos_id=eos_ids_of(TOKENIZER)[0])
    return initialise(config, key=jax.random.key(0), tokenizer=TOKENIZER, head="lm")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(write_tiny_bert(tmp_path_factory.mktemp("encoder") / "bert", WORDS))


@pytest.fixture
def pairs():
    tokens, report = tokenize_pairs(OFFLINE, TOKENIZER, Limits(6, 4), eos_ids=eos_ids_of(TOKENIZER))
    assert report.kept == 10
    return Pairs(OFFLINE, tokens)


@pytest.fixture
def context(policies, encoder, tmp_path):
    def make(*, round=2, policy="policy", kept_before=None, **section):
        folder = tmp_path / f"update-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        config = Config(
            data=DataConfig(limits=LimitsConfig(max_prompt_length=6, max_response_length=4)),
            ppo=PPOConfig(response_length=4),
            encoder=EncoderConfig(source=encoder, backend="flax", batch_size=8),
            filter=FilterConfig(**{"n": 4, "num_prompts": 3, "batch_size": 4} | section),
        )
        reads.clear()

        def prompts():
            reads.append(1)
            return PROMPTS

        key = rng.stream(jax.random.key(0), "update", round)
        return RoundContext(
            round, policies, policies, policies, key, folder, config, tmp_path / "columns", policy, "sft", None,
            prompts=prompts, kept_before=kept_before,
        )  # fmt: skip

    reads: list[int] = []
    make.reads = reads
    return make


@pytest.fixture
def asked(monkeypatch):
    """The prompts of every pass in which the policy wrote something."""
    seen: list[list[str]] = []
    write = frft._answers
    monkeypatch.setattr(frft, "_answers", lambda context, asked: [seen.append(asked.prompts), write(context, asked)][1])
    return seen


def vectors(encoder, texts):
    return embed_texts(texts, encoder=encoder, backend="flax", batch_size=8)


def generations_in(context) -> list[str]:
    [path] = context.columns.glob("texts-*.json")
    return json.loads(path.read_text())["texts"]


def report_of(context):
    return json.loads((context.folder / "filter_report.json").read_text())


def test_own_keeps_the_pairs_nearest_to_the_answer_to_their_own_prompt(context, pairs, encoder, asked):
    """Against a plain loop over the texts that were written down."""
    here = context(rule="chosen", n=3)
    kept, weights = nearest(here, pairs)
    prompts = list(dict.fromkeys(row.prompt for row in OFFLINE))
    assert asked == [prompts]
    answer = dict(zip(prompts, vectors(encoder, generations_in(here)), strict=True))
    cosine = [float(answer[row.prompt] @ v) for row, v in zip(OFFLINE, vectors(encoder, [row.chosen for row in OFFLINE]), strict=True)]
    assert kept.ids == [OFFLINE[i].id for i in sorted(np.argsort(cosine)[::-1][:3])]
    assert (weights == np.ones(3, np.float32)).all() and (kept.tokens.index_B == np.arange(3)).all()
    facts = json.loads((here.folder / "report.json").read_text())
    assert facts["kept"] == 3 and facts["chosen_similarity"] == pytest.approx(np.sort(cosine)[::-1][:3].mean(), abs=1e-5)


def test_texts_that_were_damaged_are_not_read(tmp_path):
    """One letter is another; an earlier version wrote none of these."""
    path = tmp_path / "texts-1.json"
    assert frft._kept_on_disk(path, lambda: ["abc", "π"]) == frft._kept_on_disk(path, lambda: []) == ["abc", "π"]
    path.write_text(path.read_text().replace("abc", "abd"))
    with pytest.raises(ValueError, match=f"{path} cannot be read .it is damaged: .*; delete it, and the texts are written again"):
        frft._kept_on_disk(path, lambda: [])


def test_nearest_asks_other_prompts_every_round_or_the_same(context, pairs, asked):
    """Windows of the run's prompts, from the start again at the end; the prompts are read once a round."""
    for round in (2, 3, 4, 5):
        nearest(context(round=round, compare="nearest", k=2, policy=f"policy-{round}"), pairs)
        assert len(context.reads) == 1
    names = [p.prompt for p in PROMPTS]
    assert asked == [names[0:3], names[3:6], names[6:9], names[0:3]]
    asked.clear()
    for round in (2, 3):
        nearest(context(round=round, compare="nearest", round_prompts="same", policy=f"other-{round}"), pairs)
    assert asked == [names[0:3], names[0:3]]


def test_nearest_takes_the_mean_of_the_k_most_similar(context, pairs, encoder):
    here = context(compare="nearest", k=2, rule="rejected", n=4)
    kept, _ = nearest(here, pairs)
    products = vectors(encoder, [row.rejected for row in OFFLINE]) @ vectors(encoder, generations_in(here)).T
    score = np.sort(products, axis=1)[:, -2:].mean(axis=1)
    assert kept.ids == [OFFLINE[i].id for i in sorted(np.argsort(-score, kind="stable")[:4])]


def test_the_control_reads_what_the_filter_wrote_and_keeps_as_many(context, pairs, asked):
    threshold = 0.0
    near, _ = nearest(context(n=None, threshold=threshold), pairs)
    control = context(n=None, threshold=threshold)
    drawn, weights = random_subset(control, pairs)
    assert len(asked) == 1, "the policy wrote twice"
    assert len(drawn.rows) == len(near.rows) == len(weights) and set(drawn.ids) <= {row.id for row in OFFLINE}
    assert report_of(control)["rule"] == "random"


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"max_new_tokens": 2}, {"round": 3}, {"policy": "another"}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_the_policy_wrote_is_not_reused_for_other_settings(context, pairs, asked, changes):
    nearest(context(), pairs)
    nearest(context(**changes), pairs)
    assert len(asked) == 2
    nearest(context(rule="both"), pairs)  # another rule reads the same text
    assert len(asked) == 2


def test_prompt_and_response_are_embedded_on_both_sides(context, pairs, encoder):
    here = context(embed="prompt+response", rule="chosen", n=3)
    kept, _ = nearest(here, pairs)
    prompts = list(dict.fromkeys(row.prompt for row in OFFLINE))
    joined = [prompt + text for prompt, text in zip(prompts, generations_in(here), strict=True)]
    answer = dict(zip(prompts, vectors(encoder, joined), strict=True))
    side = vectors(encoder, [row.prompt + row.chosen for row in OFFLINE])
    cosine = [float(answer[row.prompt] @ v) for row, v in zip(OFFLINE, side, strict=True)]
    assert kept.ids == [OFFLINE[i].id for i in sorted(np.argsort(cosine)[::-1][:3])]


def test_the_report_knows_the_last_round(context, pairs):
    before, _ = nearest(context(), pairs)
    here = context(round=3, kept_before=frozenset(before.ids))
    now, _ = nearest(here, pairs)
    assert report_of(here)["previous"]["both"] == len(set(before.ids) & set(now.ids)) and report_of(here)["round"] == 3


def test_ocrm_weighs_what_the_filter_keeps(context, pairs, monkeypatch):
    monkeypatch.setattr(frft, "nearest", lambda context, pairs: (pairs[:3], None))
    monkeypatch.setattr(frft, "importance_weighted", lambda *given: given)
    here = context()
    assert frft.nearest_importance_weighted(here, pairs) == (here, pairs[:3])
