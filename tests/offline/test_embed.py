"""Texts → vectors, and the vectors on disk: killed, resumed, shared, damaged. The encoder itself is tested in tests/models."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_encoder
from tiny_encoder import PAIRS, TEXTS, WORDS, write_tiny_bert

from jaxrlhf import sharding
from jaxrlhf.commands.embed import add_arguments, main
from jaxrlhf.models.hub.encoder import load_classifier, load_encoder
from jaxrlhf.offline import encoders
from jaxrlhf.offline import vectors as store_module
from jaxrlhf.offline.embed import embed_texts
from jaxrlhf.offline.embed_file import embed_file
from jaxrlhf.offline.encoder_identity import encoder_identity
from jaxrlhf.offline.encoders import TextEncoder, classify_pairs, compiled_pass, padded_width
from jaxrlhf.offline.vectors import VectorError, embed_cached

GOLDEN = json.loads(tiny_encoder.GOLDEN.read_text())
MANY = [f"{word} {'is ' * (n % 9)}{n}" for n in range(12) for word in ("good", "the red")] + list(TEXTS)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("embed") / "encoder", WORDS)


@pytest.fixture
def counted(monkeypatch):
    """An encoder of three numbers that says which texts it was given."""
    given = []

    def fake(identity, **_):
        def embed(texts, progress=None):
            given.append(list(texts))
            if progress:
                progress(0, len(texts))
                progress(len(texts), len(texts))
            return np.asarray([[len(text), sum(map(ord, text)) % 97, 1.0] for text in texts], np.float32)

        return TextEncoder(identity, embed)

    monkeypatch.setattr(store_module, "open_encoder", fake)
    return given


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.name != ".lock" and path.is_file()
    }


def test_vectors_come_in_the_order_of_the_texts(bert):
    seen = []
    found = embed_texts(list(TEXTS), encoder=bert, backend="flax", batch_size=4, progress=lambda *at: seen.append(at))
    np.testing.assert_allclose(found, GOLDEN["vectors"]["bert-mean"], rtol=0, atol=1e-5)
    assert found.dtype == np.float32 and seen == [(0, 7), (4, 7), (7, 7)]
    assert embed_texts([], encoder=bert, backend="flax").shape == (0, 32)
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    np.testing.assert_allclose(embed_texts(list(TEXTS), encoder=bert, backend="flax", batch_size=6, mesh=mesh), found, rtol=0, atol=1e-6)


def test_after_a_batch_of_every_width_nothing_compiles(bert):
    encode = compiled_pass(load_encoder(bert, max_length=16).bert.encode, None)
    how = {"encoder": bert, "backend": "flax", "batch_size": 8, "max_length": 16}
    embed_texts(["good " * (4 * width - 2) for width in (1, 2, 3, 4) for _ in range(8)], **how)
    compiled = encode._cache_size()  # type: ignore[attr-defined]
    assert compiled >= 4  # those of this file's other tests may be there too
    for count in (5, 17, 64):  # fewer than a batch, a batch and a rest, many
        embed_texts([f"{'bad ' * (7 * n % 23)}{n}" for n in range(count)], **how)
    assert encode._cache_size() == compiled  # type: ignore[attr-defined]


def test_widths_are_few_and_little_is_padded():
    assert [padded_width(n, 512) for n in (1, 4, 5, 32, 33, 128, 129, 256, 257, 512)] == [4, 4, 8, 32, 40, 128, 144, 256, 288, 512]
    assert padded_width(50, 50) == 50
    assert len({padded_width(n, 256) for n in range(1, 257)}) == 28


def test_batches_take_every_row_once_from_long_to_short():
    rows = [([1] * n,) for n in (3, 9, 1, 30, 9, 2, 17)]
    batches = list(encoders._batches(rows, 3, 30, None))
    assert [members.tolist() for members, _ in batches] == [[3, 6, 1], [4, 0, 5], [2]]
    assert [tokens.shape for _, (tokens, _) in batches] == [(3, 30), (3, 12), (3, 4)]
    assert [mask.sum(1).tolist() for _, (_, mask) in batches] == [[30, 17, 9], [9, 3, 2], [1, 0, 0]]


def test_what_is_no_text_is_refused_by_row(bert):
    for texts, error, words in (
        (["fine", "bad \ud800"], ValueError, "text 1 holds a lone surrogate at character 4"),
        (["fine", None], TypeError, "text 1 is a NoneType"),
        ("a string", TypeError, "one string"),
    ):
        with pytest.raises(error, match=words):
            embed_texts(texts, encoder=bert, backend="flax")
        with pytest.raises(error, match=words):
            embed_cached(texts, folder="never", encoder=bert, backend="flax")
    for options, words in (
        ({"backend": "onnx"}, "onnx"),
        ({"pooling": "max"}, "max"),
        ({"backend": "sentence-transformers", "dtype": "bfloat16"}, "flax"),
    ):
        with pytest.raises(ValueError, match=words):
            encoder_identity(bert, **options)
    with pytest.raises(ValueError, match="batch_size is 0"):
        embed_texts(["a"], encoder=bert, backend="flax", batch_size=0)


def test_a_text_without_a_token_is_refused(bert, tmp_path):
    folder = Path(shutil.copytree(bert, tmp_path / "bare"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    with pytest.raises(ValueError, match=r"text 1 .* has no token"):
        embed_texts(["good", ""], encoder=folder, backend="flax")


def test_the_identity_is_the_content_and_the_options_not_the_place(bert, tmp_path):
    first = encoder_identity(bert, backend="flax")
    copy = Path(shutil.copytree(bert, tmp_path / "copy"))
    assert encoder_identity(copy, backend="flax").key == first.key and first.pooling == "mean"
    others = [{"pooling": "cls"}, {"max_length": 8}, {"dtype": "bfloat16"}, {"backend": "sentence-transformers"}]
    keys = [encoder_identity(copy, **({"backend": "flax"} | change)).key for change in others]
    (copy / "1_Pooling" / "config.json").write_text((copy / "1_Pooling" / "config.json").read_text() + "\n")
    keys.append(encoder_identity(copy, backend="flax").key)
    assert len({first.key, *keys}) == 6


def test_equal_texts_are_computed_once_and_a_second_run_computes_nothing(counted, bert, tmp_path, monkeypatch):
    seen = []
    texts = ["bb", "a", "bb", "ccc", "a"]
    found = embed_cached(texts, folder=tmp_path, encoder=bert, backend="flax", shard_rows=2, progress=lambda *at: seen.append(at))
    assert counted == [["ccc", "bb"], ["a"]] and found.embedded == 3 and seen == [(0, 3), (2, 3), (3, 3)]
    assert found.vectors[:, 0].tolist() == [2, 1, 2, 3, 1] and isinstance(found.shards[0], np.memmap)
    assert found.take([3, 0])[:, 0].tolist() == [3, 2] and found.take(slice(1, 3))[:, 0].tolist() == [1, 2] and len(found) == 5

    monkeypatch.setattr(store_module, "open_encoder", lambda *a, **k: pytest.fail("the encoder was loaded"))
    again = embed_cached(texts[::-1], folder=tmp_path, encoder=bert, backend="flax")
    assert again.embedded == 0 and again.vectors[:, 0].tolist() == [1, 3, 2, 1, 2]


def test_later_texts_and_other_encoders_leave_what_is_there(counted, bert, tmp_path):
    embed_cached(["a", "bb"], folder=tmp_path, encoder=bert, backend="flax")
    before = files_of(tmp_path)
    later = embed_cached(["new one", "a"], folder=tmp_path, encoder=bert, backend="flax")
    other = embed_cached(["a"], folder=tmp_path, encoder=bert, backend="flax", pooling="cls")
    assert counted == [["bb", "a"], ["new one"], ["a"]] and later.folder != other.folder
    assert later.vectors[:, 0].tolist() == [7, 1]
    after = files_of(tmp_path)
    assert {name: after[name] for name in before if not name.endswith("index.json")} == {
        n: b for n, b in before.items() if not n.endswith("index.json")
    }


def test_stopped_at_any_write_it_goes_on_to_the_same_bytes(counted, bert, tmp_path, monkeypatch):
    how = {"encoder": bert, "backend": "flax", "shard_rows": 10}
    whole = embed_cached(MANY, folder=tmp_path / "whole", **how)
    expected, replace = files_of(tmp_path / "whole"), os.replace
    assert len(whole.shards) == 4
    for stop in range(12):  # three files a shard
        left = iter(range(stop))

        def dies(*names, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(*names)

        folder = tmp_path / f"stopped-{stop}"
        monkeypatch.setattr(store_module.os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            embed_cached(MANY, folder=folder, **how)
        monkeypatch.setattr(store_module.os, "replace", replace)
        resumed = embed_cached(MANY, folder=folder, **how)
        assert resumed.embedded == len(set(MANY)) - 10 * (stop // 3)
        assert {name: data for name, data in files_of(folder).items() if not name.endswith(".partial")} == expected
        np.testing.assert_array_equal(resumed.vectors, whole.vectors)


KILLED = """
import json, os, signal, sys
from jaxrlhf.offline.vectors import embed_cached
texts, folder, encoder, last = json.loads(sys.argv[1])
def progress(done, total):
    if last is not None and done >= last:
        os.kill(os.getpid(), signal.SIGKILL)
print(embed_cached(texts, folder=folder, encoder=encoder, backend="flax", batch_size=4, shard_rows=8, progress=progress).embedded)
"""


def test_killed_the_real_encoder_goes_on_to_the_same_bytes(bert, tmp_path):
    def start(folder, last):
        arguments = json.dumps([MANY, str(tmp_path / folder), str(bert), last])
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | cache}
        return subprocess.Popen([sys.executable, "-c", KILLED, arguments], **pipes)

    whole, killed = start("whole", None), start("killed", 12)
    whole.communicate()
    killed.communicate()
    assert (whole.returncode, killed.returncode) == (0, -signal.SIGKILL)
    again = start("killed", None)
    out, errors = again.communicate()
    assert again.returncode == 0 and int(out) == len(set(MANY)) - 8, errors[-2000:]
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_two_at_once_compute_once(bert, tmp_path, monkeypatch):
    given, first_in = [], threading.Event()

    def slow(identity, **_):
        def embed(texts, progress=None):
            given.extend(texts)
            first_in.set()
            threading.Event().wait(0.2)
            return np.ones((len(texts), 2), np.float32)

        return TextEncoder(identity, embed)

    monkeypatch.setattr(store_module, "open_encoder", slow)
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(embed_cached(["a", "b"], folder=tmp_path, encoder=bert, backend="flax", shard_rows=1))
        )
        for _ in range(2)
    ]
    threads[0].start()
    first_in.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert sorted(given) == ["a", "b"] and sorted(r.embedded for r in results) == [0, 2]


def test_damaged_folders_and_broken_encoders_are_refused(counted, bert, tmp_path, monkeypatch):
    how = {"encoder": bert, "backend": "flax"}
    folder = embed_cached(["a", "bb"], folder=tmp_path, **how).folder
    whole = files_of(folder)
    for name, spoilt, words in (
        ("vectors-00000.npy", whole["vectors-00000.npy"][:-5], "vectors-00000.npy is damaged: it has 147 bytes, and was written with 152"),
        ("vectors-00000.npy", whole["vectors-00000.npy"][:-1] + b"\0", r"vectors-00000.npy is damaged: its content \(sha256\) is another"),
        ("keys-00000.npy", whole["vectors-00000.npy"], "keys-00000.npy is damaged"),
        ("index.json", b"{", "index.json cannot be read"),
        ("index.json", whole["index.json"].replace(b'"rows": 2', b'"rows": 1'), "index.json cannot be read .it is damaged"),
        ("index.json", b'{"format": 99}', "format 99"),
    ):
        (folder / name).write_bytes(spoilt)
        with pytest.raises(VectorError, match=words):
            embed_cached(["a", "bb"], folder=tmp_path, **how)
        (folder / name).write_bytes(whole[name])
    with pytest.raises(ValueError, match="shard_rows is 0"):
        embed_cached(["a"], folder=tmp_path, shard_rows=0, **how)
    nan = TextEncoder(encoder_identity(bert, backend="flax"), lambda texts, progress: np.full((len(texts), 3), np.nan, np.float32))
    monkeypatch.setattr(store_module, "open_encoder", lambda *a, **k: nan)
    with pytest.raises(VectorError, match="no finite vector for the text 'zzz'"):
        embed_cached(["zzz"], folder=tmp_path, **how)


def test_pairs_of_texts_are_classified_in_their_order(tmp_path):
    classifier = load_classifier(tiny_encoder.CLASSIFIERS["bert"](tmp_path / "c"), max_length=40)
    first, second = map(list, zip(*PAIRS, strict=True))
    np.testing.assert_allclose(classify_pairs(classifier, first, second), GOLDEN["logits"]["bert"], rtol=0, atol=2e-5)
    assert classify_pairs(classifier, [], []).shape == (0, 3)
    with pytest.raises(ValueError, match="make no pairs"):
        classify_pairs(classifier, first, second[1:])


@pytest.fixture
def pairs_file(tmp_path):
    rows = [{"prompt": f"q{n}", "chosen": f"good {n % 2}", "rejected": f"bad {n}"} for n in range(4)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_embeds_a_file_and_says_what_it_did(pairs_file, bert, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [str(pairs_file), "--output", str(tmp_path / "v"), "--encoder", str(bert), "--backend", "flax", "--max_length", "16"]
    assert main(parser.parse_args(words)) == 0
    printed = capsys.readouterr()
    assert "4 rows, 6 different texts, 6 embedded now (32 dimensions)" in printed.out and "embed: step 6/6" in printed.err
    assert main(parser.parse_args(words)) == 0
    assert "0 embedded now" in capsys.readouterr().out


def test_embed_file_reads_the_fields_it_is_asked_for(counted, pairs_file, bert, tmp_path):
    done = embed_file(str(pairs_file), output=tmp_path / "v", fields=("prompt",), encoder=str(bert), backend="flax", limit=2)
    assert (done["rows"], done["texts"], done["embedded"], done["dimension"], done["backend"]) == (2, 2, 2, 3, "flax")
    written = tmp_path / "generations.jsonl"
    written.write_text(json.dumps({"prompt": "q", "response": "an answer"}) + "\n")
    embed_file(str(written), output=tmp_path / "v", fields=("response",), encoder=str(bert), backend="flax")
    assert sorted(counted[0]) == ["q0", "q1"] and counted[1] == ["an answer"]
    for fields, words in ((("chosen", "response"), "chosen, response"), ((), "no field")):
        with pytest.raises(ValueError, match=words):
            embed_file(str(pairs_file), output=tmp_path / "v", fields=fields, encoder=str(bert), backend="flax")
