"""What each check says of a planted fault. The long forms, through the command, are in tests/faults/test_preflight.py."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxrlhf.algorithms.reward_update import Pairs
from jaxrlhf.algorithms.rounds import METHODS
from jaxrlhf.comparison.judge_client import Judge
from jaxrlhf.data.pairs import Demonstration, Pair, ReadReport, write_pairs
from jaxrlhf.data.tokens import pad_left, pad_right
from jaxrlhf.preflight import looks, models, rows, training
from jaxrlhf.preflight.screen import GREEN, RED, UNCHECKED, YELLOW, Found, Look, run_looks, shown
from jaxrlhf.preflight.subject import Subject
from jaxrlhf.types import PairBatch, PairLoss, TextBatch


def pairs(n, *, swapped=False, start=0):
    """Pairs that a word tells apart."""
    said = [("good", "mean"), ("mean", "good")][swapped]
    return [Pair(f"p{i}", f"prompt {i}", f"{said[0]} {i}", f"{said[1]} {i}", "here") for i in range(start, start + n)]


def texts(n=4, width=6, *, end=1):
    """Responses of different lengths; `end` is their last id."""
    prompt, mask = pad_left([[5, 6, 7][: 1 + i % 3] for i in range(n)], 4, 0)
    response, seen = pad_right([[*range(8, 9 + i % 3), end] for i in range(n)], width, 1)
    return TextBatch(prompt, mask, response, seen, np.ones(n, bool), np.arange(n, dtype=np.int32))


def pair_batch(n=4):
    t, other = texts(n), texts(n, end=3)
    columns = {"margin": np.linspace(0, 1, n, dtype=np.float32)}
    return PairBatch(
        t.prompt_BL, t.prompt_mask_BL, t.response_BT, t.response_mask_BT, other.response_BT, other.response_mask_BT,
        np.ones(n, np.float32), t.row_mask_B, t.index_B, columns,
    )  # fmt: skip


@pytest.fixture
def subject(tiny_config, tmp_path):
    """A subject with a config alone: each test gives what its check looks at."""
    return lambda found=None, **changes: SimpleNamespace(
        **{"samples_pairs": False, "config": tiny_config(tmp_path, **changes), "method": METHODS["ocrm"], "mesh": None, "judge": None}
        | (found or {})
    )


def test_swapped_sides(subject):
    fine = rows.floor(subject({"pairs": (pairs(40), pairs(30, start=40), ReadReport())}))
    assert fine.colour == GREEN and "of 30 held-out pairs" in fine.figure and "bag of words in 1.000 [" in fine.figure
    assert rows.floor(subject({"pairs": (pairs(40), pairs(30, start=40, swapped=True), ReadReport())})).colour == RED
    both = rows.floor(subject({"pairs": ([*pairs(40), *pairs(40, swapped=True)], pairs(9), ReadReport())}))
    assert both.colour == YELLOW and "80 in both orders" in both.figure


def test_gold_that_always_says_the_same(subject):
    def asked(gold):
        demonstrations = [Demonstration(p.id, p.prompt, p.chosen, "") for p in pairs(9)]
        return rows.gold(subject({"gold": gold, "demonstrations": (demonstrations, ReadReport())}))

    assert asked(lambda prompts, said: 0.01 * np.arange(len(said))).colour == GREEN
    assert "nothing can be learned" in asked(lambda prompts, said: np.full(len(said), 0.3, np.float32)).advice
    assert "not finite" in asked(lambda prompts, said: np.full(len(said), np.nan, np.float32)).advice


def test_responses_without_eos_and_all_cut(subject):
    tokenizer = SimpleNamespace(eos_token_id=1, chat_template=None, get_chat_template=None)
    assert rows.eos(subject({"texts": (texts(), ReadReport()), "tokenizer": tokenizer})).colour == GREEN
    assert rows.eos(subject({"texts": (texts(end=2), ReadReport()), "tokenizer": tokenizer})).colour == RED
    whole, cut, some = (None, ReadReport(10)), ReadReport(10), ReadReport(10)
    cut.counts["responses truncated"], some.counts["responses truncated"] = 20, 10
    given = {"prompt_tokens": whole}
    assert rows.lengths(subject(given | {"pair_tokens": whole})).colour == GREEN
    half = rows.lengths(subject(given | {"pair_tokens": (None, some)}))
    assert half.colour == YELLOW and "10 of 20 responses" in half.figure
    assert rows.lengths(subject(given | {"pair_tokens": (None, cut)})).colour == RED


def test_duplicates_across_splits(tiny_config, tmp_path):
    write_pairs(tmp_path / "train.jsonl", pairs(30))
    found = {}
    for name, held in (("none", pairs(5, start=50)), ("equal", pairs(5, start=27)), ("near", [replace(pairs(1)[0], prompt="Prompt  0")])):
        write_pairs(tmp_path / f"{name}.jsonl", held)
        data = {"train": str(tmp_path / "train.jsonl"), "valid": str(tmp_path / f"{name}.jsonl")}
        config = tiny_config(tmp_path, **{f"data__{k}": v for k, v in data.items()}, pairs__source="data", gold__kind="none")
        found[name] = rows.duplicates(Subject(config))
    assert [one.colour for one in found.values()] == [GREEN, YELLOW, RED]
    assert "3 training rows" in found["equal"].figure and "1 differ" in found["near"].figure


def test_padding_on_the_wrong_side():
    assert models.layout(texts()) == "" == models.layout(pair_batch())
    t = texts()
    assert "prompt_mask_BL of row 0" in models.layout(replace(t, prompt_mask_BL=t.prompt_mask_BL[:, ::-1]))
    assert "chosen_mask_BT of row 0" in models.layout(replace(pair_batch(), chosen_mask_BT=pair_batch().chosen_mask_BT[:, ::-1]))


def test_two_temperatures(subject):
    assert looks.temperatures(subject()).colour == GREEN
    two = looks.temperatures(subject(weights__temperature=0.7))
    assert two.colour == YELLOW and "weights.temperature 0.7" in two.advice
    section = SimpleNamespace(temperature=1.0, top_k=0, top_p=1.0, response_length=3)
    metrics = {"rollout/kl": 0.0, "rollout/decode_mismatch": 1e-6, "rollout/eos_rate": 0.5}
    seen = SimpleNamespace(mask_BT=np.ones((2, 3)), row_mask_B=np.ones(2))
    fine = models.rollout(subject({"sampled": (seen, metrics, section)}))
    assert fine.colour == GREEN and "(n = 6)" in fine.figure and "1 of 2 responses end" in fine.figure
    for off, rows_beyond, colour in ((0.2, 0, RED), (float("nan"), 0, RED), (0.2, 50, YELLOW)):  # such rows the sampler bars
        policy = SimpleNamespace(params={"backbone": {"embed": {"embedding": np.zeros(9 + rows_beyond)}}})
        given = {"sampled": (seen, metrics | {"rollout/decode_mismatch": off}, section), "policy": policy, "tokenizer": range(9)}
        assert models.rollout(subject(given)).colour == colour


def counting(mask):
    """A step on pairs whose loss is w · (tokens that `mask(batch)` counts) / rows; its gradient is all that it computes."""

    def make(accumulate):
        def step(state, batch):
            total = jnp.sum(jnp.where(batch.row_mask_B, jnp.sum(mask(batch), axis=1), 0)) / jnp.sum(batch.row_mask_B)
            return replace(state, opt_state={"w": total}), {"loss/pair": state.params["w"] * total}

        return step

    return make


def test_a_loss_that_takes_ids_for_a_mask():
    """PAD is EOS here: whoever counts the ids that are not EOS counts padding that has another id."""
    params = {"w": jnp.float32(1)}
    fine = training.gradient(counting(lambda batch: batch.chosen_mask_BT), pair_batch(), params, loss="loss/pair")
    assert fine.colour == GREEN
    bad = training.gradient(counting(lambda batch: batch.chosen_BT == 1), pair_batch(), params, loss="loss/pair")
    assert bad.colour == RED and "masks" in bad.advice
    none = training.gradient(counting(lambda batch: 0 * batch.chosen_BT), pair_batch(), params, loss="loss/pair")
    assert none.colour == RED and "nothing would be learned" in none.advice


@pytest.fixture
def own(monkeypatch):
    """A module of the user's."""

    def bad_field(outputs, batch, *, total=None):
        return jnp.sum(batch.chosen_scores), {}

    def stale(context, given):
        first = np.arange(len(given.rows), dtype=np.float32)  # by row, not by id
        return given, first

    def good(context, given):
        return given, np.array([float(row.id[1:]) for row in given.rows])

    module = SimpleNamespace(bad=PairLoss("scalar", (), bad_field), stale=stale, good=good, __spec__=None, __name__="own_of_test")
    monkeypatch.setitem(sys.modules, "own_of_test", module)


def test_a_reward_update_that_goes_by_row(subject, own):
    given = subject({"few_pairs": Pairs(pairs(4), pair_batch()), "policy": None, "reward": None, "key": jax.random.key(0)})
    for name, colour in (("good", GREEN), ("stale", RED)):
        given.method = replace(METHODS["ocrm"], reward_update=f"own_of_test:{name}")
        assert training.update(given).colour == colour
    given.method = METHODS["ocrm"]
    assert training.update(given) is None


def test_a_judge_without_its_package(subject, monkeypatch):
    assert looks.judge(subject()) is None
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    monkeypatch.setitem(sys.modules, "openai", SimpleNamespace())
    given = subject({"judge": Judge("m")})
    assert looks.judge(given).colour == GREEN
    monkeypatch.setitem(sys.modules, "openai", None)
    found = one_look(looks.judge, given)
    assert found.colour == RED and "pip install 'jaxrlhf[judge]'" in found.figure


def test_what_a_run_refuses_is_a_red_line(subject):
    assert one_look(looks.settings, subject()).colour == GREEN
    bad = one_look(looks.settings, subject(reward__batch_size=30))
    assert bad.colour == RED and "reward.batch_size 30" in bad.figure and bad.advice == ""


def test_a_users_loss_with_a_wrong_field(subject, own):
    bad = one_look(training.traced, subject(reward__loss="own_of_test:bad"))
    assert bad.colour == RED and "'PairBatch' object has no attribute 'chosen_scores'" in bad.figure
    assert "test_preflight.py" in bad.advice and "batch.chosen_scores" in bad.advice


def one_look(function, given):
    given.part = lambda name: None
    ((_, _, found),) = run_looks([Look("a", function, ())], {"run": lambda: given})
    return found


def test_arms_that_agree_share_a_line_and_a_fault_is_told_once(capsys):
    def look(subject):
        if subject.value == 2:
            raise KeyError("no such thing")
        return Found(GREEN, f"value {subject.value}")

    def arm(value):
        return lambda: SimpleNamespace(value=value, part=lambda name: value)

    looks = [Look("first", look, ("value",)), Look("second", look, ("value",))]
    lines = list(run_looks(looks, {name: arm(value) for name, value in zip("abc", (1, 1, 2), strict=True)}))
    kinds = [(arm, name, found.colour) for arm, name, found in lines]
    assert kinds == [("a", "first", GREEN), ("a", "second", GREEN), ("c", "first", RED), ("c", "second", UNCHECKED)]
    shown(lines, Console(width=80, color_system=None))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and "2 green, 1 red, 1 not checked" in said and "no such thing" in said
    assert [line for line in said.splitlines() if not line.startswith(" ")] == ["a", "c", "2 green, 1 red, 1 not checked"]
