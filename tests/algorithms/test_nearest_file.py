"""`jaxrlhf nearest` outside of any run: with a tiny encoder, from files to columns, kept pairs and report."""

import argparse
import json

import numpy as np
import pytest
from tiny_encoder import write_tiny_bert

from jaxrlhf.algorithms.nearest_file import fingerprint, nearest_file, own_rows
from jaxrlhf.commands import nearest
from jaxrlhf.config import FilterConfig
from jaxrlhf.data.columns import join_columns, read_header
from jaxrlhf.data.pairs import read_pairs
from jaxrlhf.data.read_report import DataError
from jaxrlhf.data.stored_responses import read_generations
from jaxrlhf.offline.embed import embed_texts

WORDS = ["river", "stone", "cloud", "apple", "train", "music", "glass", "tiger"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Twelve pairs on four prompts, the second of them twice; the policy's texts, two for the first prompt."""
    folder = tmp_path_factory.mktemp("nearest")
    rng = np.random.default_rng(0)
    text = lambda: " ".join(rng.choice(WORDS, 4))  # noqa: E731
    rows = [{"prompt": f"say {i % 4}", "chosen": text(), "rejected": text()} for i in range(12)]
    rows.append(rows[1])
    answers = [{"prompt": f"say {i}", "response": text(), "sample": 0} for i in range(4)] + [{"prompt": "say 0", "response": "tiger"}]
    for name, content in (("pairs", rows), ("generations", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    write_tiny_bert(folder / "encoder", WORDS)
    return folder


def options(inputs, **changes):
    given = {"embeddings": inputs / "vectors", "generations": str(inputs / "generations.jsonl")}
    return given | {"encoder": str(inputs / "encoder"), "backend": "flax", "section": FilterConfig(**{"n": 4} | changes)}


def cosines(inputs, responses, generations):
    vectors = [embed_texts(t, encoder=inputs / "encoder", backend="flax") for t in (responses, generations)]
    return (vectors[0] @ vectors[1].T).astype(np.float64)


@pytest.mark.parametrize("compare", ["own", "nearest"])
def test_similarities_are_those_of_the_texts(inputs, tmp_path, compare):
    pairs, _ = read_pairs(inputs / "pairs.jsonl")
    answers = read_generations(str(inputs / "generations.jsonl"))
    report = nearest_file(
        str(inputs / "pairs.jsonl"), output=tmp_path / "out", **options(inputs, compare=compare, k=1 if compare == "own" else 2)
    )
    ids = [p.id for p in pairs]
    got = join_columns(ids, tmp_path / "out", ["chosen_similarity", "rejected_similarity", "keep"], expect={"compare": compare})
    expected = {}
    for side in ("chosen", "rejected"):
        table = cosines(inputs, [getattr(p, side) for p in pairs], [a.response for a in answers])
        own = np.array([table[i, int(p.prompt[-1])] for i, p in enumerate(pairs)])  # generation i answers prompt i, first
        expected[side] = own if compare == "own" else np.sort(table, axis=1)[:, -2:].mean(axis=1)
        np.testing.assert_allclose(got[f"{side}_similarity"], expected[side], atol=2e-6)
    # either: of the twelve different pairs the four with the largest side
    best = np.argsort(-np.maximum(expected["chosen"], expected["rejected"])[:12], kind="stable")[:4]
    kept = [json.loads(line) for line in (tmp_path / "out" / "kept.jsonl").read_text().splitlines()]
    assert {row["id"] for row in kept} == {ids[i] for i in best} == {ids[i] for i in np.flatnonzero(got["keep"])}
    again, _ = read_pairs(tmp_path / "out" / "kept.jsonl")
    assert {(p.id, p.prompt, p.chosen, p.rejected) for p in again} <= {(p.id, p.prompt, p.chosen, p.rejected) for p in pairs}
    assert report["kept"] == 4 and report["duplicates"] == {"pairs": 1, **{k: v for k, v in report["duplicates"].items() if k != "pairs"}}
    assert json.loads((tmp_path / "out" / "filter_report.json").read_text()) == report
    header = read_header(tmp_path / "out")["header"]
    assert (
        header["generations"] == fingerprint(answers)
        and header["rule"] == "either"
        and header["k"] == (2 if compare == "nearest" else None)
    )


def test_again_writes_the_same_bytes_and_other_settings_do_not_replace_it(inputs, tmp_path):
    first = nearest_file(str(inputs / "pairs.jsonl"), output=tmp_path / "out", **options(inputs))
    content = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert {"header.json", "kept.jsonl", "filter_report.md", "filter_report.svg"} < set(content)
    assert nearest_file(str(inputs / "pairs.jsonl"), output=tmp_path / "out", **options(inputs)) == first
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == content
    with pytest.raises(FileExistsError, match="was made with another n, rule; give another output, or --overwrite"):
        nearest_file(str(inputs / "pairs.jsonl"), output=tmp_path / "out", **options(inputs, n=5, rule="both"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == content
    second = nearest_file(
        str(inputs / "pairs.jsonl"), output=tmp_path / "out", previous=tmp_path / "out", overwrite=True, **options(inputs, rule="both")
    )
    assert second["previous"]["kept"] == 4 and second["rule"] == "both"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="holds no columns; give another output"):
        nearest_file(str(inputs / "pairs.jsonl"), output=tmp_path / "mine", overwrite=True, **options(inputs))


def test_the_random_control_keeps_as_many_from_the_same_pairs(inputs, tmp_path):
    def ids(folder):
        return [json.loads(line)["id"] for line in (folder / "kept.jsonl").read_text().splitlines()]

    for seed in (0, 1):
        nearest_file(str(inputs / "pairs.jsonl"), output=tmp_path / str(seed), seed=seed, **options(inputs, rule="random"))
        assert len(ids(tmp_path / str(seed))) == 4
    assert ids(tmp_path / "0") != ids(tmp_path / "1")
    with pytest.raises(ValueError, match="rule 'random' draws n pairs"):
        nearest_file(str(inputs / "pairs.jsonl"), output=tmp_path / "x", **options(inputs, rule="random", threshold=0.5))


def test_prompt_and_response_are_embedded_on_both_sides_alike(inputs, tmp_path):
    nearest_file(str(inputs / "pairs.jsonl"), output=tmp_path / "out", **options(inputs, embed="prompt+response"))
    pairs, _ = read_pairs(inputs / "pairs.jsonl")
    answers = read_generations(str(inputs / "generations.jsonl"))
    table = cosines(inputs, [p.prompt + p.chosen for p in pairs], [a.prompt + a.response for a in answers])
    got = join_columns([p.id for p in pairs], tmp_path / "out", ["chosen_similarity"], expect={})["chosen_similarity"]
    np.testing.assert_allclose(got, [table[i, int(p.prompt[-1])] for i, p in enumerate(pairs)], atol=2e-6)


def test_a_prompt_without_a_generation_is_an_error_that_names_the_pair(inputs):
    pairs, _ = read_pairs(inputs / "pairs.jsonl")
    answers = read_generations(str(inputs / "generations.jsonl"))
    with pytest.raises(DataError, match=rf"pair id '{pairs[2].id}' .*pairs.jsonl:3.* has no generation, nor have those of 2 more of 13"):
        own_rows(pairs, [a for a in answers if a.prompt != "say 2"])
    np.testing.assert_array_equal(own_rows(pairs[:5], answers), [0, 1, 2, 3, 0])  # the first of prompt 0's two


def test_generations_are_read_whole_or_not_at_all(tmp_path):
    file = tmp_path / "g.jsonl"
    file.write_text('{"prompt": "a", "response": ""}\n{"prompt": "a", "completion": "b"}\n{"prompt": "c", "response_1": "d"}\n')
    assert [(g.prompt, g.response) for g in read_generations(str(file))] == [("a", ""), ("a", "b"), ("c", "d")]
    assert fingerprint(read_generations(str(file))) != fingerprint(read_generations(str(file))[::-1])
    for line, says in (('{"prompt": "a"}', r"g.jsonl:1: a stored response has the texts"), ("{", "g.jsonl:1: not JSON")):
        file.write_text(line + "\n")
        with pytest.raises(DataError, match=says):
            read_generations(str(file))
    file.write_text("")
    with pytest.raises(DataError, match="there is no response"):
        read_generations(str(file))


def test_the_command_line(inputs, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    nearest.add_arguments(parser)
    given = ["--embeddings", inputs / "vectors", "--generations", inputs / "generations.jsonl", "--encoder", inputs / "encoder"]
    given += ["--backend", "flax", "--n", 3, "--rule", "half-half", "--output", tmp_path / "out", "--compare", "nearest", "--k", 2]
    assert nearest.main(parser.parse_args([str(inputs / "pairs.jsonl"), *map(str, given)])) == 0
    out = capsys.readouterr().out
    assert "3 of 13 pairs kept; mean similarity chosen 0." in out and f"pairs: {tmp_path / 'out' / 'kept.jsonl'}" in out
    assert read_header(tmp_path / "out")["header"]["dedupe"] is True
    given += ["--keep_duplicates", "--overwrite"]
    assert nearest.main(parser.parse_args([str(inputs / "pairs.jsonl"), *map(str, given)])) == 0
    assert read_header(tmp_path / "out")["header"]["dedupe"] is False


def test_k_with_one_generation_a_pair_is_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"--k 3 averages over several generations, but --compare own has one a pair"):
        nearest_file(str(inputs / "pairs.jsonl"), output=tmp_path / "out", **options(inputs, compare="own", k=3))
