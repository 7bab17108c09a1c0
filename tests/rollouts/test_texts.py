"""`jaxrlhf generate`: rows in the order of the prompts, reproducible, and clear about what it cannot do."""

import io
import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxrlhf.data.pairs import Prompt
from jaxrlhf.data.tokens import Limits
from jaxrlhf.data.toy import toy_tokenizer
from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.hub import initialise, save
from jaxrlhf.rollouts import dataset, texts
from jaxrlhf.rollouts.texts import generate_texts
from jaxrlhf.types import Completion, PromptBatch

OPTIONS = {
    "prompts": [], "file": None, "max_new_tokens": 4, "max_prompt_length": 6, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    "num_samples": 1, "batch_size": 2, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = toy_tokenizer()
    shape = {"family": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    config, _ = config_from_shape(shape, len(tokenizer), max_positions=16, pad_id=0, eos_id=1)
    path = tmp_path_factory.mktemp("policy")
    save(initialise(config, key=jax.random.key(0), tokenizer=tokenizer), path / "model")
    save(initialise(config, key=jax.random.key(0)), path / "bare")
    return path


def test_samples(folder, tmp_path, capsys):
    prompts = ["farmers sold apples", "nurses hid", "well well well well well well well"]
    options = {**OPTIONS, "folder": str(folder / "model"), "num_samples": 2}
    rows = list(generate_texts(**{**options, "prompts": prompts}))
    assert [(row["id"], row["sample"]) for row in rows] == [("0", 0), ("1", 0), ("0", 1), ("1", 1)]
    assert "7 tokens, limit 6" in capsys.readouterr().err  # named, not silently dropped
    assert rows[0]["response"] != rows[2]["response"]  # two samples of one prompt
    for row in rows:
        assert len(row["response"].split()) <= 4 and isinstance(row["finished"], bool)
    assert list(generate_texts(**{**options, "prompts": prompts})) == rows
    assert list(generate_texts(**{**options, "prompts": prompts, "seed": 1})) != rows
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"row {i}", "prompt": text}) + "\n" for i, text in enumerate(prompts[:2])))
    again = list(generate_texts(**{**options, "file": str(path)}))
    assert [row["response"] for row in again] == [row["response"] for row in rows] and again[0]["id"] == "row 0"


def test_an_answer_ended_where_its_own_eos_stands(monkeypatch):
    mask = np.array([[True, True, False], [True, True, True], [True, False, False]])
    out = SimpleNamespace(response_BT=np.array([[5, 1, 0], [5, 6, 7], [5, 1, 1]]), response_mask_BT=mask)
    monkeypatch.setattr(texts, "sample_texts", lambda *given, **how: (out, ["a", "b", "c"]))
    given: Any = (None, None, None, SimpleNamespace(eos_ids=(1,)))
    assert texts.answers(*given) == [("a", True), ("b", False), ("c", False)]


def test_prompts_are_as_wide_as_few_shapes_allow():
    loaded: Any = SimpleNamespace(tokenizer=toy_tokenizer())
    table, kept = texts.tokens_of(loaded, [Prompt("a", "farmers sold apples", "x"), Prompt("b", "nurses", "x")], Limits(20, 4))
    assert table.prompt_BL.shape == (2, 8) and kept == [0, 1]


def test_a_dataset_has_the_responses_with_their_masks(monkeypatch):
    """Three prompts, two at once: what fills the last batch is cut off."""

    def generate(model, params, prompt_BL, mask_BL, key, *, index_B, **how):
        ends = np.asarray(index_B)[:, None] % 3
        return Completion(10 * np.asarray(index_B)[:, None] + np.arange(3), np.arange(3) <= ends, np.zeros((len(index_B), 3)))  # type: ignore[arg-type]

    monkeypatch.setattr(dataset, "generate", generate)
    ones = np.ones((3, 2), np.int32)
    prompts = PromptBatch(ones, ones > 0, np.array([True, True, False]), np.arange(3, dtype=np.int32))  # type: ignore[arg-type]
    model: Any = None
    table = dataset.sample_dataset(model, {}, prompts, jax.random.key(0), dataset.Sampling(3, (1,)), batch_size=2)
    assert table.response_BT.tolist() == [[0, 1, 2], [10, 11, 12], [20, 21, 22]] and table.row_mask_B is prompts.row_mask_B
    assert table.response_mask_BT.tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_what_it_cannot_do(folder, monkeypatch):
    options = {**OPTIONS, "folder": str(folder / "model")}
    with pytest.raises(ValueError, match=r"num_samples is 0"):
        list(generate_texts(**{**options, "num_samples": 0}))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    with pytest.raises(ValueError, match=r"there is no prompt"):
        list(generate_texts(**options))
    with pytest.raises(ValueError, match=r"bare has no tokenizer; save one beside the model"):
        list(generate_texts(**{**options, "folder": str(folder / "bare"), "prompts": ["x"]}))


def test_a_reward_model_is_no_policy(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["GPTNeoXForSequenceClassification"]}')
    options = {"file": None, "max_new_tokens": 2, "max_prompt_length": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with pytest.raises(ValueError, match="reward model"):
        list(generate_texts(folder=str(tmp_path), prompts=["a"], num_samples=1, batch_size=1, seed=0, **options))
