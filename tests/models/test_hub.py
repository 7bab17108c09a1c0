import copy
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from jaxrlhf import models, sharding
from jaxrlhf.data import toy
from jaxrlhf.data.pairs import Demonstration
from jaxrlhf.data.tokenizer import train_tokenizer
from jaxrlhf.data.tokens import Limits, eos_ids_of, tokenize_demonstrations
from jaxrlhf.models import encoder
from jaxrlhf.models.hub import safetensors

GOLDEN = json.loads(tiny_models.GOLDEN.read_text())["models"]


def folder_of(name, path, kind="lm"):
    return tiny_models.write_folder(path / f"{name}-{kind}", tiny_models.VARIANTS[name], GOLDEN[name]["shapes"][kind])


def tokenizer_of(words, **special):
    backend = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("shard_bytes", [10**9, 5_000])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox-old-spelling", "gpt_neox-sequential", "llama-3.1-rope", "qwen3"])
def test_a_folder_comes_back_bit_for_bit(name, shard_bytes, tmp_path):
    source = folder_of(name, tmp_path)
    loaded = models.load(source)
    models.save(loaded, tmp_path / "out", max_shard_bytes=shard_bytes)
    written = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert (len(written) > 3) == (shard_bytes == 5_000)
    read = {}
    for file in written:
        read |= load_file(tmp_path / "out" / file)
    expected = load_file(source / "model.safetensors")
    assert read.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_array_equal(read[tensor], value)
    again = models.load(tmp_path / "out")
    assert again.config == loaded.config
    assert_trees_equal(again.params, loaded.params)


def test_shards_keep_to_their_size_and_the_index_counts_bytes(tmp_path):
    models.save(models.load(folder_of("llama", tmp_path)), tmp_path / "out", max_shard_bytes=9_000)
    index = json.loads((tmp_path / "out" / safetensors.INDEX).read_text())
    total = 0
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(tmp_path / "out" / file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}  # transformers refuses files without it
            size = sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
        assert size <= 9_000
        total += size
    assert total == index["metadata"]["total_size"]
    next(iter((tmp_path / "out").glob("model-00002*"))).unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of"):
        models.load(tmp_path / "out")


def test_every_field_of_the_config_survives(tmp_path):
    folder = folder_of("gpt_neox-old-spelling", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"torch_dtype": "float16", "eos_token_id": [1, 3], "my_field": {"a": [1]}, "classifier_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1], "top_p": 0.9}))
    loaded = models.load(folder)
    models.save(loaded, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    changed = {"torch_dtype": "float32", "dtype": "float32", "architectures": ["GPTNeoXForCausalLM"]}
    assert written == {**config, **changed}
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"eos_token_id": [7, 1], "top_p": 0.9}
    assert models.eos_ids(loaded) == (7, 1, 3)


@pytest.mark.parametrize(("stated", "eos"), [(2, "<end>"), ([2, 1], "<end>"), (None, None), (99, None)])
def test_a_bare_tokenizer_file_gets_its_eos_from_the_config(stated, eos, tmp_path):
    """tokenizer.json alone does not say which token ends a text; what a tokenizer says of itself is left as it is."""
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": stated}))
    tokenizer_of(["<unk>", "a", "<end>"]).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert models.hub.read_tokenizer(tmp_path).eos_token == eos
    tokenizer_of(["<unk>", "a", "<end>"], eos_token="a").save_pretrained(str(tmp_path))
    assert models.hub.read_tokenizer(tmp_path).eos_token == "a"


def test_eos_ids_include_the_tokenizers(tmp_path):
    loaded = models.load(folder_of("llama", tmp_path))
    assert models.eos_ids(loaded) == (1,)
    assert models.eos_ids(loaded._replace(tokenizer=tokenizer_of(["<unk>", "a", "<end>"], eos_token="<end>"))) == (1, 2)


TEMPLATE = "{% for m in messages %}{{ m['content'] }}<turn>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def chat_tokenizer(words, **special):
    """A base model's tokenizer: its EOS is not what its chat template ends a message with."""
    tokenizer = tokenizer_of(words, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<bot>", "<turn>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_what_ends_a_templated_response_in_training_ends_it_in_sampling(tmp_path):
    """A base model with a chat template: config.json and the tokenizer name one EOS, conversations end in another."""
    tokenizer = chat_tokenizer(["<unk>", "<end>", "q", "yes"], eos_token="<end>")
    loaded = models.load(folder_of("llama", tmp_path))._replace(tokenizer=tokenizer)
    rows = [Demonstration("0", "q<bot>", "yes", "f:1", True), Demonstration("1", "q", "yes", "f:2")]
    table, _ = tokenize_demonstrations(rows, tokenizer, Limits(4, 4), eos_ids=eos_ids_of(tokenizer))
    last = [int(row[mask][-1]) for row, mask in zip(np.asarray(table.response_BT), np.asarray(table.response_mask_BT), strict=True)]
    assert [tokenizer.convert_ids_to_tokens(i) for i in last] == ["<turn>", "<end>"]
    assert set(last) == set(models.eos_ids(loaded)) == set(eos_ids_of(tokenizer))
    models.save(loaded, tmp_path / "out")
    assert models.eos_ids(models.load(tmp_path / "out")) == models.eos_ids(loaded)


def test_another_tokenizer_brings_its_own_ends(tmp_path):
    """Id 3 was the end of a turn and is a word now; id 1 is the same token in both and still ends a response."""
    folder = folder_of("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [1, 3], "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "top_p": 0.9}))
    old = tokenizer_of(["<unk>", "<end>", "a", "<turn>"], eos_token="<end>")
    old.save_pretrained(str(folder))
    loaded = models.load(folder)
    assert models.eos_ids(models.with_tokenizer(loaded, copy.deepcopy(old))) == (3, 1)  # the same tokenizer changes nothing
    new = chat_tokenizer(["<unk>", "<end>", "a", "word", "<stop>"], eos_token="<stop>", bos_token="a", pad_token="<unk>")
    turned = models.with_tokenizer(loaded, new)
    assert models.eos_ids(turned) == (1, 4, new.convert_tokens_to_ids("<turn>"))
    assert turned.config.hf["bos_token_id"] == 2 and turned.config.generation == {"eos_token_id": [1, 4, 6], "top_p": 0.9}
    models.save(turned, tmp_path / "out")
    assert models.eos_ids(models.load(tmp_path / "out")) == models.eos_ids(turned)
    assert models.eos_ids(models.with_tokenizer(loaded._replace(tokenizer=None), new)) == (4, 6)
    rows = loaded.params["backbone"]["embed"]["embedding"].shape[0]
    with pytest.raises(ValueError, match=rf"tokenizer has {rows + 1} ids but the model's embedding only {rows} rows"):
        models.with_tokenizer(loaded, tokenizer_of(["<unk>", *(f"w{n}" for n in range(rows))], eos_token="w1"))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_load_as_float32(dtype, tmp_path):
    folder = folder_of("gpt2", tmp_path)
    tensors = {name: value.astype(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    params = models.load(folder).params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    expected = tensors["transformer.wte.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["backbone"]["embed"]["embedding"], expected)


def test_old_buffers_bare_names_and_the_other_name_of_a_head_are_understood(tmp_path):
    neox, gpt2 = folder_of("gpt_neox-old-spelling", tmp_path), folder_of("gpt2", tmp_path)
    expected_neox, expected_gpt2 = models.load(neox).params, models.load(gpt2).params
    tensors = load_file(neox / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    for buffer in ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"):
        tensors[f"gpt_neox.layers.0.{buffer}"] = np.zeros(4, np.float32)
    save_file(tensors, neox / "model.safetensors")
    assert_trees_equal(models.load(neox).params, expected_neox)
    bare = {name.removeprefix("transformer."): value for name, value in load_file(gpt2 / "model.safetensors").items()}
    bare |= {"h.0.attn.bias": np.zeros((1, 1, 4, 4), np.float32), "lm_head.weight": bare["wte.weight"]}
    save_file(bare, gpt2 / "model.safetensors")
    assert_trees_equal(models.load(gpt2).params, expected_gpt2)


def test_wrong_tensors_are_one_error_that_names_them(tmp_path):
    folder = folder_of("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    moved = {**tensors, "model.extra.weight": np.zeros(2, np.float32)}
    del moved["model.norm.weight"], moved["model.layers.1.mlp.up_proj.weight"]
    save_file(moved, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model.layers.1.mlp.up_proj.weight, model.norm.weight; unknown: model.extra.weight"):
        models.load(folder)
    save_file({**tensors, "model.norm.weight": np.zeros(5, np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight .* has shape \[5\]"):
        models.load(folder)
    save_file({**tensors, "model.norm.weight": np.zeros(24, np.int8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="is int8"):
        models.load(folder)


def test_sources_that_are_no_model_say_what_they_lack(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        models.load(tmp_path)
    folder = folder_of("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="safetensors only"):
        models.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read .*copy or make the model.s folder again"):
        models.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "model_type 'bloom' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_settings_that_are_not_computed_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        models.config_from_hf({**tiny_models.VARIANTS["llama"], **change})


@pytest.mark.parametrize(
    ("settings", "theta", "rotary_dim"),
    [
        ({}, 10_000.0, 2),  # GPT-NeoX's own defaults: a quarter of a head of 8
        ({"rotary_pct": 0.5, "rotary_emb_base": 500}, 500.0, 4),
        ({"partial_rotary_factor": 0.5, "rope_theta": 500}, 500.0, 4),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}, "rotary_pct": 0.5}, 500.0, 8),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rotary_pct": 1.0}, 10_000.0, 8),
    ],
)
def test_every_spelling_of_rotary_settings(settings, theta, rotary_dim):
    bare = {name: value for name, value in tiny_models.VARIANTS["gpt_neox-old-spelling"].items() if not name.startswith("rotary")}
    config = models.config_from_hf({**bare, **settings})
    assert (config.rope_theta, config.rotary_dim) == (theta, rotary_dim)
    assert (config.rope_scaling is not None) == ("rope_scaling" in settings)


def test_a_window_is_read_as_each_family_means_it():
    mistral, qwen = tiny_models.VARIANTS["mistral-window"], tiny_models.VARIANTS["qwen2-window"]
    assert models.config_from_hf(mistral).sliding_layers == (0, 1, 2)
    assert models.config_from_hf({**mistral, "sliding_window": None}).sliding_layers == ()
    assert models.config_from_hf(qwen).sliding_layers == (1, 2)
    assert models.config_from_hf({**qwen, "use_sliding_window": False}).sliding_window is None
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert models.config_from_hf({**qwen, "layer_types": kinds}).sliding_layers == (0,)


def test_a_new_head_needs_a_key(tmp_path):
    folder = folder_of("llama", tmp_path)
    with pytest.raises(ValueError, match=r"no 'scalar' head.*pass key="):
        models.load(folder, head="scalar")
    reward = models.load(folder, head="scalar", key=jax.random.key(0))
    lm = models.load(folder)
    assert_trees_equal(reward.params["backbone"], lm.params["backbone"])
    assert_trees_equal(models.rehead(lm, head="scalar", key=jax.random.key(0)).params, reward.params)
    models.save(reward, tmp_path / "reward")
    with pytest.raises(ValueError, match="no 'lm' head"):
        models.load(tmp_path / "reward")


def test_reward_bias_is_saved_and_a_language_model_forgets_it(tmp_path):
    lm = models.load(folder_of("qwen2", tmp_path))
    reward = models.with_reward_bias(models.rehead(lm, head="scalar", key=jax.random.key(0)), 1.25)
    models.save(reward, tmp_path / "reward")
    config = json.loads((tmp_path / "reward/config.json").read_text())
    assert config["reward_bias"] == 1.25 and config["architectures"] == ["Qwen2ForSequenceClassification"]
    again = models.load(tmp_path / "reward", head="scalar")
    assert models.reward_bias(again) == 1.25 and models.reward_bias(lm) == 0.0
    assert_trees_equal(again.params, reward.params)
    models.save(models.rehead(again, head="lm"), tmp_path / "lm")
    assert not {"reward_bias", "id2label", "label2id"} & json.loads((tmp_path / "lm/config.json").read_text()).keys()


WORDS = ["<unk>", "<end>", *(f"w{n}" for n in range(27))]  # 29, as many as the models have rows


@pytest.mark.parametrize(
    ("tokenizer", "pad", "rows"),
    [
        (tokenizer_of(WORDS, eos_token="<end>", pad_token="w5"), 7, 29),  # its own
        (tokenizer_of(WORDS[:20], eos_token="<end>"), 20, 29),  # a spare row
        (tokenizer_of(WORDS[:20], eos_token="<end>", pad_token="<end>"), 20, 29),  # pad = EOS will not do
        (tokenizer_of(WORDS[:20], eos_token="<end>", pad_token="<unk>"), 20, 29),  # nor will a token of the text
        (tokenizer_of(WORDS, eos_token="<end>"), 29, 30),  # one appended row
        (None, 0, 29),  # without tokenizer, the config's
    ],
)
def test_a_saved_reward_model_pads_with_a_token_that_ends_nothing(tokenizer, pad, rows, tmp_path):
    loaded = models.load(folder_of("llama", tmp_path, "scalar"), head="scalar")._replace(tokenizer=tokenizer)
    before = None if tokenizer is None else len(tokenizer)
    models.save(loaded, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["pad_token_id"], config["vocab_size"]) == (pad, rows)
    again = models.load(tmp_path / "out", head="scalar")
    table, expected = again.params["backbone"]["embed"]["embedding"], loaded.params["backbone"]["embed"]["embedding"]
    assert table.shape[0] == rows
    np.testing.assert_array_equal(table[:29], expected)
    if tokenizer is not None:
        assert len(tokenizer) == before  # the one in use is left alone
        assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == pad == again.tokenizer.pad_token_id


def test_a_tokenizer_beyond_the_model_is_an_error(tmp_path):
    loaded = models.load(folder_of("llama", tmp_path, "scalar"), head="scalar")
    larger = tokenizer_of([*WORDS, "more", "and more"], eos_token="<end>")
    with pytest.raises(ValueError, match="pad id 31 lies beyond the 29 rows"):
        models.save(loaded._replace(tokenizer=larger), tmp_path / "out")
    assert not list(tmp_path.glob("*out*")), "nothing half written stays behind"


def test_saving_replaces_a_folder_whole(tmp_path, monkeypatch):
    loaded = models.load(folder_of("gpt2", tmp_path))
    out = tmp_path / "out"
    models.save(loaded, out, max_shard_bytes=5_000)
    models.save(loaded, out)
    assert not (out / safetensors.INDEX).exists(), "no shard of the old folder is left"

    calls = iter(range(5))

    def broken(part):
        if next(calls) == 4:
            raise OSError("disk full")
        return jax.device_get(part)

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(sharding, "gather", broken)
    with pytest.raises(OSError, match="disk full"):
        models.save(loaded, out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2-lm", "out"]


def test_parameters_go_where_the_sharding_table_says(tmp_path):
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
    loaded = models.load(folder_of("gpt_neox-old-spelling", tmp_path), mesh=mesh)
    kernel = loaded.params["backbone"]["layers_0"]["attention"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 16)
    models.save(loaded, tmp_path / "out")
    assert_trees_equal(models.load(tmp_path / "out").params, jax.device_get(loaded.params))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"])
def test_a_model_from_a_shape_describes_itself(family, tmp_path):
    shape = {"family": family, "hidden_size": 24, "num_layers": 1, "num_heads": 4, "num_kv_heads": None, "intermediate_size": None}
    config, hf = models.config_from_shape(shape, 31, max_positions=40, pad_id=2, eos_id=[1, 3])
    assert models.config_from_hf(hf) == config
    assert (config.vocab_size, config.max_positions, config.num_kv_heads, config.head_dim) == (31, 40, 4, 6)
    assert config.intermediate_size == (96 if family in ("gpt2", "gpt_neox") else 64)
    loaded = models.initialise(config, key=jax.random.key(0))
    assert models.eos_ids(loaded) == (1, 3)
    models.save(loaded, tmp_path / "out")
    again = models.load(tmp_path / "out")
    assert again.config == config
    assert_trees_equal(again.params, loaded.params)


TEXT = "Human: it's 1234,\n\n  don't  you\tthink? Ünïcödé 日本 🙂"


def test_a_tokenizer_gives_the_ids_of_the_one_that_was_saved(tmp_path):
    """transformers goes by the family where it has a tokenizer of that name, and takes words apart in that family's way."""
    for n, (tokenizer, text) in enumerate(((train_tokenizer([TEXT] * 3, 300), TEXT), (toy.toy_tokenizer(), " ".join(toy.VOCABULARY)))):
        tokenizer.save_pretrained(str(tmp_path / str(n)))
        for family in models.families.FAMILIES:
            (tmp_path / str(n) / "config.json").write_text(json.dumps({"model_type": family}))
            again = models.read_tokenizer(tmp_path / str(n))
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"] and len(again) == len(tokenizer), family


def test_where_transformers_reads_other_ids_the_way_that_reads_these_is_said(tmp_path, capsys):
    """Once a family: of qwen2, whose tokenizers AutoTokenizer makes anew from their words, whatever class the folder names."""
    tokenizer, others = train_tokenizer([TEXT] * 3, 300), []
    for n, family in enumerate([*models.families.FAMILIES, "qwen2"]):
        shape = {"family": family, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
        config, _ = models.config_from_shape(shape, len(tokenizer), max_positions=8, pad_id=0, eos_id=1)
        models.save(models.initialise(config, key=jax.random.key(0), tokenizer=tokenizer), tmp_path / str(n))
        assert PreTrainedTokenizerFast.from_pretrained(tmp_path / str(n))(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
        others += [family] * (AutoTokenizer.from_pretrained(tmp_path / str(n))(TEXT)["input_ids"] != tokenizer(TEXT)["input_ids"])
    said = [line for line in capsys.readouterr().err.splitlines() if "AutoTokenizer" in line]
    assert len(said) == len(set(others)), f"AutoTokenizer gives other ids in {others}; said: {said}"
    assert all(family in line and "PreTrainedTokenizerFast.from_pretrained" in line for family, line in zip(set(others), said, strict=True))


def test_a_tokenizer_that_came_to_other_ids_is_refused(tmp_path):
    """A folder says which ids its tokenizer gave when it was saved: another version of a library, or a file of another, is seen."""
    folder = tmp_path / "out"
    loaded = models.load(folder_of("qwen2", tmp_path))._replace(tokenizer=tokenizer_of(WORDS, eos_token="<end>", pad_token="w5"))
    models.save(loaded, folder)
    models.load(folder)
    tokenizer_of(WORDS[::-1], eos_token="<end>", pad_token="w5").save_pretrained(str(folder))
    with pytest.raises(ValueError, match=r"the tokenizer in .*out gives other ids than the one that was saved there: "):
        models.load(folder)


def test_shapes_that_cannot_be_are_refused():
    shape = {"family": "gpt_neox", "hidden_size": 30, "num_layers": 1, "num_heads": 4}
    with pytest.raises(ValueError, match="hidden_size 30 does not divide over 4 heads"):
        models.config_from_shape(shape, 10, max_positions=8)
    with pytest.raises(ValueError, match="no grouped key-value heads"):
        models.config_from_shape({**shape, "hidden_size": 32, "num_kv_heads": 2}, 10, max_positions=8)
    with pytest.raises(ValueError, match="family 'rwkv'"):
        models.config_from_shape({**shape, "family": "rwkv"}, 10, max_positions=8)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox-old-spelling", "llama"])
@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_a_compiled_or_distributed_module_are_understood(name, wrapper, tmp_path):
    folder = folder_of(name, tmp_path)
    expected = reads(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({wrapper + tensor: value for tensor, value in tensors.items()}, folder / "model.safetensors")
    assert reads(folder) == expected


def reads(folder, head="lm"):
    """The bytes of the parameters of a folder, or why it is refused."""
    try:
        return [leaf.tobytes() for leaf in map(np.asarray, jax.tree.leaves(models.load(folder, head=head).params))]
    except ValueError as error:
        return str(error)


def with_tensors(folder, *, drop=(), **config):
    """The folder without some tensors, and with other fields in config.json."""
    tensors = {name: value for name, value in load_file(folder / "model.safetensors").items() if name not in drop}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return folder


def test_a_head_that_is_not_what_the_config_says_is_refused_by_its_reason(tmp_path):
    lost = with_tensors(folder_of("llama", tmp_path), drop=["lm_head.weight"])
    assert "no 'lm' head (lm_head.weight), and its config.json does not say tie_word_embeddings: true" in reads(lost)
    both = with_tensors(folder_of("llama", tmp_path / "both"), tie_word_embeddings=True)
    assert "an lm_head.weight that is not its embedding, and tie_word_embeddings: true" in reads(both)
    for name in ("llama", "gpt2"):  # untied and tied
        assert "is a reward model (score.weight), which writes no text" in reads(folder_of(name, tmp_path, "scalar")), name
    two = folder_of("llama", tmp_path / "two", "scalar")
    save_file(load_file(two / "model.safetensors") | {"score.weight": np.zeros((2, 24), np.float32)}, two / "model.safetensors")
    assert "scores 2 labels, and a reward model one" in reads(two, "scalar")


class Recorder(dict):
    """A config.json that notes which of its keys are asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("family", [*models.families.FAMILIES, *encoder.FAMILIES])
def test_every_key_of_a_config_class_is_read_refused_or_known_to_change_nothing(family):
    """A new key of transformers' classes is red here until somebody has said what it means."""
    hf = Recorder(AutoConfig.for_model(family).to_dict())
    hf |= {"use_sliding_window": True, "sliding_window": 4} if "use_sliding_window" in hf else {}
    (encoder.bert_config_from_hf if family in encoder.FAMILIES else models.config_from_hf)(hf)
    ignored = {key for keys in models.families.IGNORED.values() for key in keys}
    assert hf.keys() - hf.asked - ignored == set()


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_a_factor_that_transformers_does_not_read_is_refused(name):
    """Half rotated heads by config.json, whole ones by transformers: one of the two is not what was trained."""
    hf = tiny_models.VARIANTS[name]
    spellings = (
        {"partial_rotary_factor": 0.5},
        {"rotary_pct": 0.5},
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    )
    for stated in spellings:
        with pytest.raises(ValueError, match=r"partial_rotary_factor 0.5 .* rotates whole heads"):
            models.config_from_hf({**hf, **stated})
    assert models.config_from_hf({**hf, "partial_rotary_factor": 1.0}) == models.config_from_hf(hf)


def test_a_number_that_is_not_finite_is_named_with_its_tensor(tmp_path):
    """In a file that is read, and in a model that would be written: of that there is no folder then."""
    folder = folder_of("llama", tmp_path)
    file, whole = folder / "model.safetensors", models.load(folder)
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    for value, dtype in ((np.nan, np.float32), (-np.inf, np.float16), (1e300, np.float64)):
        broken = tensors[name].astype(dtype)
        broken[1, 2] = value
        save_file({**tensors, name: broken}, file, metadata={"format": "pt"})
        said = rf"{re.escape(f'{name} in {file}')} holds (nan|-inf|inf) \(1 of {broken.size} numbers are not finite\): the file is damaged"
        with pytest.raises(ValueError, match=said):
            models.load(folder)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(whole.params)}
    bad = next(leaf for path, leaf in leaves.items() if "down" in path)
    params = jax.tree.map(lambda leaf: leaf.at[0, 0].set(np.inf) if leaf is bad else leaf, whole.params)
    with pytest.raises(
        ValueError, match=rf"{re.escape(name)} holds inf \(1 of {bad.size} numbers are not finite\): the model has diverged"
    ):
        models.save(whole._replace(params=params), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
