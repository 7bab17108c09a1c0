"""Text that spells its EOS, and the same text without it, for gold, judge, lengths and vectors, in a run, `evaluate` and FRFT."""

import json
from itertools import pairwise

import numpy as np
import pytest
from tiny_encoder import write_tiny_bert

from jaxrlhf.algorithms.nearest_file import nearest_file
from jaxrlhf.comparison import compare
from jaxrlhf.comparison.judge_client import Judge
from jaxrlhf.config import FilterConfig, ToyTask
from jaxrlhf.data import toy
from jaxrlhf.data.pairs import dataset_hash, read_demonstrations, read_pairs, read_prompts
from jaxrlhf.data.stored_responses import read_generations
from jaxrlhf.data.tokenizer import train_tokenizer
from jaxrlhf.evaluation.samples import Samples
from jaxrlhf.offline import vectors
from jaxrlhf.offline.embed_file import embed_file
from jaxrlhf.offline.encoders import TextEncoder
from jaxrlhf.pipeline import inputs
from jaxrlhf.pipeline.stages.evaluation import gold_figures
from jaxrlhf.recipe import from_mapping
from jaxrlhf.scorers.toy import toy_gold

ENDS = ["<|endoftext|>", "</s>", " <eos><pad> <pad>", "<|im_end|>\n", "<end_of_turn>", "[PAD][PAD]"]  # as data sets and programs leave them


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def posts():
    return toy.prompts(ToyTask(), 12, 0, "evaluation")


@pytest.fixture(params=["plain", "spelled"])
def ends(request, posts):
    return [ENDS[i % len(ENDS)] if request.param == "spelled" else "" for i in range(len(posts))]


def test_a_policy_that_repeats_the_references_ties_with_them_in_a_run(tmp_path, posts, ends):
    rows = [{"prompt": row.prompt, "completion": row.reference + end} for row, end in zip(posts, ends, strict=True)]
    file = lines(tmp_path / "a.jsonl", rows)
    given = {"train": file, "valid": file}
    config = from_mapping({"data": given, "pairs": {"source": "sample"}, "gold": {"kind": "function", "source": "gold_of_mine:score"}})
    read, told = inputs.evaluation_prompts_of(config), [row.reference for row in posts]
    gold = lambda prompts, texts, blocks=None: np.array([len(text) for text in texts], np.float32)  # noqa: E731
    samples = Samples(read, (None, None), (told, told), (gold(None, told),) * 2)
    figures = gold_figures(samples, gold)
    assert (figures["tie_rate"], figures["win_rate"], figures["gold"]) == (1.0, 0.0, np.mean([len(text) for text in told]))
    assert [row.reference for row in read] == told


def test_references_and_responses_in_evaluate(tmp_path, posts, ends, monkeypatch):
    """Figures of gold and length, and what the judge is asked: those of the bare texts."""
    asked = {}
    monkeypatch.setattr(compare, "_judged", lambda texts, *_: asked.update(a=texts.a, b=texts.b))
    rows = [{"prompt": row.prompt, "completion": row.reference + end} for row, end in zip(posts, ends, strict=True)]
    prompts, stored = lines(tmp_path / "prompts.jsonl", rows), lines(tmp_path / "stored.jsonl", [{**row, "id": "x"} for row in rows[::-1]])
    done = compare.evaluate(stored, "reference", output=tmp_path / "out", gold="toy", judge=Judge("m"), prompts=prompts)
    told = [row.reference for row in posts]
    assert asked == {"a": told, "b": told}
    assert done.figures["gold"]["tie_rate"] == 1.0
    assert done.figures["a"]["length"] == done.figures["b"]["length"] and done.figures["b"]["length"] == np.mean(list(map(len, told)))
    assert done.figures["b"]["gold"]["value"] == pytest.approx(toy_gold()([row.prompt for row in posts], told).mean())
    # an evaluation that was stored with its references
    whole = [{"prompt": r["prompt"], "response": ".", "reference": r["completion"]} for r in rows]
    bare = compare.evaluate(lines(tmp_path / "w.jsonl", whole), "reference", output=tmp_path / "w", gold="toy")
    assert [row["b"] for row in bare.rows] == told


def test_vectors_and_what_the_filter_keeps(tmp_path, monkeypatch):
    point = lambda text: np.random.default_rng(list(text.encode())).normal(size=8)  # noqa: E731
    unit = lambda texts: np.float32([point(text) / np.linalg.norm(point(text)) for text in texts])  # noqa: E731
    monkeypatch.setattr(vectors, "open_encoder", lambda identity, **_: TextEncoder(identity, lambda texts, progress=None: unit(texts)))
    words = ["river", "stone", "cloud", "apple"]
    write_tiny_bert(tmp_path / "encoder", words)
    encoder = {"encoder": str(tmp_path / "encoder"), "backend": "flax"}
    rows = [{"id": str(i), "prompt": f"say {i}", "chosen": f"{a} {b}", "rejected": f"{b} {a}"} for i, (a, b) in enumerate(pairwise(words))]
    found = []
    for name, end in (("plain", ""), ("spelled", "<|endoftext|>")):
        pairs = [row | {side: row[side] + end for side in ("chosen", "rejected")} for row in rows]
        said = [{"prompt": row["prompt"], "response": row["chosen"] + end} for row in rows]
        files = lines(tmp_path / f"{name}.jsonl", pairs), lines(tmp_path / f"{name}-said.jsonl", said)
        embedded = [embed_file(file, output=tmp_path / "vectors", fields=fields, **encoder)["embedded"] for file, fields in
                    ((files[0], ("chosen", "rejected")), (files[1], ("response",)))]  # fmt: skip
        report = nearest_file(
            files[0], embeddings=tmp_path / "vectors", generations=files[1], output=tmp_path / name, section=FilterConfig(n=2), **encoder
        )
        found.append((report["similarity"], dataset_hash(read_pairs(files[0])[0]), (tmp_path / name / "kept.jsonl").read_text()))
    assert embedded == [0, 0], "the same text has the same vector"
    assert found[0] == found[1] and found[0][0]["chosen"]["mean_kept"] == pytest.approx(1.0)


def test_every_schema_loses_it_once_and_says_so(tmp_path):
    """Nothing else of a text changes: white space in front stays, but for one space; what is spelled inside stays; prompts stay."""
    end = "<|endoftext|>"
    tokenizer = train_tokenizer([], 258)
    tokenizer.eos_token = "<my_end>"
    for read, row, fields in (
        (read_pairs, {"prompt": f"p{end}", "chosen": f"c{end}", "rejected": f"{end}r\n{end}"}, (f"p{end}", "c", f"{end}r\n")),
        (read_pairs, {"chosen": f"\n\nAssistant: c{end}", "rejected": "\n\nAssistant: r </s>"}, ("\n\nAssistant:", " c", " r")),
        (read_demonstrations, {"prompt": "p", "completion": f" d{end}{end}\n"}, ("p", " d")),
        (read_demonstrations, {"text": f"t  {end}"}, ("", "t ")),
        (read_prompts, {"prompt": "p", "response": f"r{end}"}, ("p", "r")),
        (read_demonstrations, {"prompt": "p", "response": "r<my_end>", "templated": True}, ("p", "r")),
    ):
        (one,), report = read(lines(tmp_path / "a.jsonl", [row]), tokenizer=tokenizer)
        texts = [getattr(one, name) for name in ("prompt", "chosen", "rejected", "response", "reference") if hasattr(one, name)]
        assert tuple(texts) == fields
        assert report.counts["responses with EOS or PAD spelled at the end (taken off)"] == (2 if read is read_pairs else 1)
    rows = [
        {"prompt": "p", "chosen": "c", "rejected": f"c{end}"},
        {"prompt": "p", "chosen": "c", "rejected": end},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
    ]
    assert list(read_pairs(lines(tmp_path / "b.jsonl", rows))[1].reasons()) == ["identical sides", "empty response"]


def test_a_tag_that_the_text_opened_is_no_end(tmp_path):
    """`<s>` is HTML for what is struck through. The same in training data and in stored responses, whatever the tokenizer."""
    tokenizer = train_tokenizer([], 258)
    tokenizer.add_special_tokens({"eos_token": "</s>", "bos_token": "<s>"})
    for text, bare in (
        ("<s>old price</s>", "<s>old price</s>"),
        ("now <s>9</s> 7 <s>8</s>\n", "now <s>9</s> 7 <s>8</s>\n"),
        ("<s>old</s><|endoftext|>", "<s>old</s>"),
        ("<s>a <s>b</s> </s> </s>", "<s>a <s>b</s> </s>"),
        ("<s>old</s> price</s>", "<s>old</s> price"),
        ("price </s></s>", "price"),
    ):
        file = lines(tmp_path / "a.jsonl", [{"prompt": "p", "response": text, "reference": text}])
        (one,), _ = read_demonstrations(file, tokenizer=tokenizer)
        (two,) = read_generations(file)
        assert [one.response, two.response, two.reference] == [bare] * 3
