"""A reward-model folder as a scorer of text: its own tokenizer, its bias, any batch size, any mesh."""

import jax
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.data.tokens import Limits
from jaxrlhf.data.toy import toy_tokenizer
from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.hub import initialise, save, with_reward_bias
from jaxrlhf.pipeline import inputs
from jaxrlhf.recipe import from_mapping
from jaxrlhf.scorers.reward_model import Frame, frame_of, reward_model_scorer, score_responses
from jaxrlhf.types import TextBatch

PROMPTS = ["farmers sold apples", "nurses hid maps ashore late", "well"]
RESPONSES = ["farmers sold apples .", "maps", "nurses hid maps . nurses hid maps ."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = toy_tokenizer()
    shape = {"family": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    config, _ = config_from_shape(shape, len(tokenizer), max_positions=32, pad_id=0, eos_id=1)
    loaded = initialise(config, key=jax.random.key(0), tokenizer=tokenizer, head="scalar")
    path = tmp_path_factory.mktemp("reward") / "model"
    save(with_reward_bias(loaded, 0.25), path)
    return path, loaded


def by_hand(loaded, prompt, response) -> float:
    """The scalar at EOS of the bare text, less the bias."""
    ids = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response)]
    text = np.array([[*ids[0], *ids[1], loaded.tokenizer.eos_token_id]])
    return float(loaded.model.apply(loaded.params, text, np.ones_like(text, bool)).scalars[0, -1]) - 0.25


def test_scores_of_text(folder):
    path, loaded = folder
    score = reward_model_scorer(str(path), batch_size=2, limits=Limits(16, 16))
    got = score(PROMPTS, RESPONSES)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [by_hand(loaded, *row) for row in zip(PROMPTS, RESPONSES, strict=True)], rtol=1e-4, atol=1e-5)
    assert score([], []).shape == (0,)


def test_over_long_text_is_cut_and_still_scored(folder):
    path, _ = folder
    score = reward_model_scorer(str(path), batch_size=8, limits=Limits(2, 3))
    got = score([PROMPTS[1]] * 2, [RESPONSES[2], "nurses hid maps"])
    assert np.isfinite(got).all() and got[0] == got[1]  # prompts lose their left, responses their right end


def test_batches_and_meshes_change_nothing(folder):
    _, loaded = folder
    random = np.random.default_rng(0)
    masks = np.arange(5) >= random.integers(0, 5, (7, 1)), np.arange(4) < random.integers(0, 5, (7, 1))
    tokens = [random.integers(2, 60, mask.shape).astype(np.int32) for mask in masks]
    texts = TextBatch(tokens[0], masks[0], tokens[1], masks[1], np.ones(7, bool), np.arange(7))  # type: ignore[arg-type]
    whole = score_responses(loaded.model, loaded.params, texts, batch_size=100, bias=0.5)
    parts = score_responses(loaded.model, loaded.params, texts, batch_size=4, bias=0.5)
    on_mesh = score_responses(loaded.model, loaded.params, texts, batch_size=3, bias=0.5, mesh=sharding.make_mesh(4))
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(on_mesh, whole, rtol=1e-5, atol=1e-6)
    empty = ~masks[1].any(axis=1)
    assert (whole[empty] == 0).all() and (whole[~empty] != 0).all()


TEMPLATE = (
    "{% for m in messages %}<pad>{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<pad>assistant {% endif %}"
)


def test_a_conversation_that_golds_own_template_rendered_is_not_wrapped_again(folder, tmp_path):
    """A text prompt and the same prompt as the template writes it are the same tokens, with a system message or without."""
    _, loaded = folder
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = TEMPLATE
    save(loaded._replace(tokenizer=tokenizer), tmp_path / "chat")
    score = reward_model_scorer(str(tmp_path / "chat"), batch_size=4, limits=Limits(32, 16))
    text = "farmers sold apples"
    turns = [{"role": "user", "content": text}]
    rendered, with_system = (
        tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True)
        for m in (turns, [{"role": "system", "content": "well"}, *turns])
    )
    plain, again, system = score([text, rendered, with_system], ["maps ."] * 3)
    assert plain == again  # the same ids: the same bits
    ids = tokenizer(with_system + "maps .", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    whole = np.array([ids])
    expected = float(loaded.model.apply(loaded.params, whole, np.ones_like(whole, bool)).scalars[0, -1])
    assert system == pytest.approx(expected, rel=1e-4, abs=1e-5)
    half = score([text + "<pad>assistant ", "<pad>user " + text], ["maps ."] * 2)  # an end or a start alone is text
    assert plain not in half


def test_a_template_that_asks_for_the_date_is_given_the_runs(folder, tmp_path, capsys):
    """A text has the score of the template in which that date is written, and what was rendered at it is not wrapped again."""
    _, loaded = folder
    scores, identities = {}, {}
    for word, date in (("{{ 'well' if strftime_now('%Y') == '2031' else 'hello' }}", "2031-02-03"), ("well", ""), ("hello", "")):
        tokenizer = toy_tokenizer()
        tokenizer.chat_template = f"{word} {TEMPLATE.replace('<pad>', '')}"
        save(loaded._replace(tokenizer=tokenizer), tmp_path / "model" / word[:5])
        gold = {"kind": "model", "source": str(tmp_path / "model" / word[:5])}
        config = from_mapping({"gold": gold, "data": {"train": "none.jsonl", **({"template_date": date} if date else {})}})
        scores[word[:5]] = inputs.gold_of(config)(["maps", "well user maps <eos> assistant "], ["maps ."] * 2).tolist()  # type: ignore[misc]
        identities[word[:5]] = inputs.gold_identity(config).get("template_date")
    assert scores["well"][0] == scores["well"][1] != scores["hello"][0]
    assert scores["{{ 'w"] == scores["well"]
    assert identities["{{ 'w"] == "2031-02-03"
    assert "2024-07-26" not in capsys.readouterr().err, "a date is said that is given to no row"


def test_the_frame_of_a_template():
    tokenizer = toy_tokenizer()
    for template, start, end in ((TEMPLATE, "<pad>", " <eos> <pad>assistant "), ("Q: {{ messages[0]['content'] }} A:", "Q: ", " A:")):
        tokenizer.chat_template = template
        assert frame_of(tokenizer) == Frame(start, end)
    assert Frame("Q: ", " A:").wrote("Q: x A:") and not Frame("Q: ", " A:").wrote("x A:") and not Frame("", " ").wrote("x ")
