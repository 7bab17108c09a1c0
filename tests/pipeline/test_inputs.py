"""What a run reads: sources in every spelling, held-out prompts, what a stage's identity depends on, and what is refused at the start."""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.cli import main
from jaxrlhf.data.read_report import DataError
from jaxrlhf.data.tokenizer import train_tokenizer
from jaxrlhf.models import build_model, config_from_hf, config_from_shape
from jaxrlhf.models.hub import Loaded, load, read_config, save
from jaxrlhf.pipeline import inputs
from jaxrlhf.pipeline.checks import check
from jaxrlhf.pipeline.stages.sft import sft_stage, tokenizer_stage
from jaxrlhf.recipe import ConfigError, from_mapping, load_config, to_yaml
from jaxrlhf.storage.stage import Done

PAIR = {"prompt": "p", "chosen": " c", "rejected": " r"}
SAMPLED = {"pairs": {"source": "sample"}, "gold": {"kind": "function", "source": "gold_for_inputs:score"}}


@pytest.fixture(autouse=True)
def a_gold_function(tmp_path_factory, monkeypatch):
    """A module of the user's."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "gold_for_inputs.py").write_text("def score(prompts, responses):\n    return [float(len(text)) for text in responses]\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "gold_for_inputs", raising=False)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(train, valid=None, **sections):
    data = sections.pop("data", {})
    return from_mapping({"data": {"train": train, "valid": valid, **data}, **sections})


def test_several_files_by_list_and_by_pattern(tmp_path):
    """YAML lists, several arguments and patterns read the same rows in the same order and give a stage the same identity."""
    files = [lines(tmp_path / f"{name}.jsonl", PAIR | {"prompt": name}, PAIR | {"prompt": name * 2}) for name in "ab"]
    valid = lines(tmp_path / "v.jsonl", PAIR)
    listed, pattern = config(files, valid), config(str(tmp_path / "[ab].jsonl"), valid)
    assert listed.data.train == tuple(files)
    for one in (listed, pattern):
        check(one)
        assert [row.prompt for row in inputs.pairs_of(one)[0]] == ["a", "aa", "b", "bb"]
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(listed))
    assert load_config(again) == listed
    before = inputs.data_identity(listed)
    assert inputs.data_identity(config(files[::-1], valid)) != before  # another order is other data: first come, first kept
    lines(tmp_path / "b.jsonl", PAIR | {"prompt": "c"})
    assert inputs.data_identity(listed) != before


@pytest.mark.parametrize("given", [["{a}", "{b}"], ["{a}"]])
def test_sources_on_the_command_line(tmp_path, given, monkeypatch, capsys):
    """tyro takes one source or several; the config that is run says which."""
    names = {name: lines(tmp_path / f"{name}.jsonl", PAIR) for name in "ab"}
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {train: none.jsonl}\n")
    seen = []
    monkeypatch.setattr("jaxrlhf.pipeline.run.run", lambda config, **given: seen.append(config) or tmp_path)
    files = [text.format(**names) for text in given]
    assert main(["sft", str(recipe), "--data.train", *files, "--data.valid", names["a"], "--data.rename", "q", "prompt"]) == 0
    (found,) = seen
    assert found.data.train == (files[0] if len(files) == 1 else tuple(files))
    assert found.data.valid == names["a"] and found.data.rename == {"q": "prompt"}


def test_bad_sources_are_refused_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = lines(tmp_path / "good.jsonl", PAIR)
    empty, bad = lines(tmp_path / "empty.jsonl"), lines(tmp_path / "bad.jsonl", {"question": "q"}, PAIR | {"chosen": ""})
    for wrong, error, message in (
        ("gone.jsonl", FileNotFoundError, "gone.jsonl: no such file"),
        ("g?ne.jsonl", FileNotFoundError, "no file matches"),
        (empty, DataError, "no usable row in .*empty.jsonl"),
        (bad, DataError, "(?s)2 dropped.*bad.jsonl:1: unknown schema.*bad.jsonl:2: empty response: chosen"),
        ([bad, empty], DataError, "2 dropped"),
    ):
        places = ({"train": wrong}, {"train": good, "valid": wrong}, {"train": good, "data": {"demonstrations": wrong}})
        for place in (*places, {"train": good, "data": {"prompts": wrong}}):
            with pytest.raises(error, match=message):
                check(config(**place))
    check(config([empty, bad, good]))  # one usable row will do here; the stage names the others
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "empty.jsonl", "good.jsonl"]


def test_models_that_are_not_there_are_refused_before_sft(tmp_path):
    rows, gone = lines(tmp_path / "good.jsonl", PAIR), str(tmp_path / "gone")
    for section in ({"model": {"source": gone}}, {"gold": {"kind": "model", "source": gone}}):
        with pytest.raises(FileNotFoundError, match="gone is not a model folder"):
            inputs.check(config(rows, **section))
    with pytest.raises((ValueError, ImportError, AttributeError), match="no_such_module"):
        inputs.check(config(rows, gold={"kind": "function", "source": "no_such_module:gold"}))


def test_a_wrong_type_of_source_is_one_fault():
    with pytest.raises(ConfigError) as error:
        config(7)
    assert str(error.value).splitlines() == [str(error.value)] and "data.train is 7" in str(error.value)


def test_sampled_pairs_need_no_preferences(tmp_path):
    """Rows of prompt and reference, under the names of the data set: SFT text, prompts and evaluation are disjoint by prompt."""
    rows = [{"query": f"q{n % 30}", "answer": f" a{n}", "id": str(n)} for n in range(40)]
    one = config(
        lines(tmp_path / "t.jsonl", *rows), data={"rename": {"query": "prompt", "answer": "completion"}, "valid_fraction": 0.2}, **SAMPLED
    )
    inputs.check(one)
    held = {row.prompt: row.reference for row in inputs.held_out_of(one)}
    prompts = [row.prompt for row in inputs.prompts_of(one)[0]]
    assert held and not held.keys() & set(prompts) and held.keys() | set(prompts) == {row["query"] for row in rows}
    assert len(prompts) == len(set(prompts)) and all(held[f"q{n}"] == f" a{n}" for n in range(30) if f"q{n}" in held)
    told = inputs.demonstrations_of(one)[0]
    assert {row.prompt for row in told} == set(prompts) and len(told) == sum(row["query"] not in held for row in rows)
    assert [row.prompt for row in inputs.evaluation_prompts_of(one)] == list(held)
    valid = lines(tmp_path / "v.jsonl", {"query": "v", "answer": " w"}, {"query": "v", "answer": " x"})
    other = config(str(tmp_path / "t.jsonl"), valid, data={"rename": {"query": "prompt", "answer": "completion"}}, **SAMPLED)
    assert [(row.prompt, row.reference) for row in inputs.evaluation_prompts_of(other)] == [("v", " w")]
    assert len(inputs.prompts_of(other)[0]) == 30 and len(inputs.demonstrations_of(other)[0]) == 40


def test_what_is_held_out_belongs_to_the_identity(tmp_path):
    """The same file split as pairs and split as prompts leaves other rows out of SFT."""
    train = lines(tmp_path / "t.jsonl", *(PAIR | {"prompt": str(n)} for n in range(10)))
    assert inputs.data_identity(config(train)) != inputs.data_identity(config(train, **SAMPLED))


def model_folder(path, head=0.0):
    """What a folder holds as far as its identity goes: files, none of which is read as a model."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text('{"version": 1}')
    backbone = np.arange(200_000, dtype=np.float32)
    save_file({"backbone": backbone, "head": np.full(4, head, np.float32)}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("section", ["model", "gold"])
def test_a_model_that_is_trained_again_in_place_is_another_model(tmp_path, section):
    """Same path, size and time of change; four of 200 000 weights are new. A copy elsewhere is the same model."""
    one = model_folder(tmp_path / "a")
    stat = (one / "model.safetensors").stat()

    def seen(folder):
        made = config("toy", **SAMPLED | {section: {"source": str(folder)} | ({"kind": "model"} if section == "gold" else {})})
        return inputs.model_identity(made) if section == "model" else inputs.gold_identity(made)

    before, words = seen(one), inputs.tokenizer_identity(str(one))
    assert seen(model_folder(tmp_path / "b")) == before == seen(one)
    model_folder(one, head=1.0)
    os.utime(one / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (one / "model.safetensors").stat().st_size == stat.st_size and seen(one) != before
    assert inputs.tokenizer_identity(str(one)) == words  # weights are no part of a tokenizer
    (one / "tokenizer.json").write_text('{"version": 2}')
    assert inputs.tokenizer_identity(str(one)) != words
    (one / "notes.md").write_text("read by nothing")
    after = seen(one)
    (one / "notes.md").write_text("still read by nothing")
    assert seen(one) == after


def test_stage_hashes_follow_what_a_model_folder_holds(tmp_path):
    """The tokenizer's stage sees the tokenizer, SFT's the weights."""
    hashes = {"tokenizer": [], "sft": []}

    class Hashes:
        def __init__(self, config):
            self.config = config

        def build(self, stage, build):
            hashes[stage.name].append(stage.hash)
            return Done(stage.name, tmp_path, stage.hash, {})

    folder = model_folder(tmp_path / "m")
    for change in (lambda: None, lambda: model_folder(folder, head=2.0), lambda: (folder / "tokenizer.json").write_text("{}")):
        change()
        setting = Hashes(from_mapping({"model": {"source": str(folder)}, "pairs": {"source": "sample"}, "gold": {"kind": "toy"}}))
        sft_stage(setting, tokenizer_stage(setting))
    first, trained, tokens = hashes["tokenizer"]
    assert first == trained != tokens and len(set(hashes["sft"])) == 3


@pytest.mark.parametrize("pairs", ["data", "sample"])
def test_prompts_that_another_file_holds_out_are_left_out_of_all_training_and_named(tmp_path, pairs):
    """The valid file's prompt "b" is in all three other files; so is the empty prompt, which is not a prompt."""
    files = {
        name: lines(tmp_path / f"{name}.jsonl", *(PAIR | {"prompt": prompt} for prompt in prompts))
        for name, prompts in {"train": ["a", "b", ""], "valid": ["b", "z", ""], "told": ["b", "c", "b", ""], "asked": ["d", "b"]}.items()
    }
    sections = SAMPLED if pairs == "sample" else {}
    plain = config(files["train"], files["valid"], **sections)
    asked = {"demonstrations": files["told"], "prompts": files["asked"]}
    full = config(files["train"], files["valid"], data=asked, **sections)

    def read(of, one):
        rows, report = (found := of(one))[0], found[-1]
        assert report.kept == len(rows)
        return [row.prompt for row in rows], [s.rsplit("/")[-1] for s, reason in report.dropped if reason.startswith("held out: ")]

    assert read(inputs.pairs_of, full) == (["a", ""], ["train.jsonl:2"])
    assert read(inputs.demonstrations_of, plain) == (["a", ""], ["train.jsonl:2"])
    assert read(inputs.demonstrations_of, full) == (["c", ""], ["told.jsonl:1", "told.jsonl:3"])
    assert read(inputs.prompts_of, plain) == (["a"], ["train.jsonl:2"])
    assert read(inputs.prompts_of, full) == (["d"], ["asked.jsonl:2"])
    assert [row.prompt for row in inputs.held_out_of(full)][:2] == ["b", "z"]
    for name, of in (("train", inputs.pairs_of), ("demonstrations", inputs.demonstrations_of), ("prompts", inputs.prompts_of)):
        data = {"train": files["train"]} | {name: lines(tmp_path / "same.jsonl", PAIR | {"prompt": "z"})}
        with pytest.raises(DataError, match=f"every row of data.{name} has a prompt that is also held out"):
            of(config(data.pop("train"), files["valid"], data=data, **sections))


def test_prompts_split_off_train_are_left_out_of_the_other_files(tmp_path):
    """Without a valid file the split of `train` decides what demonstrations and prompts of their own files may not contain."""
    names = [str(n) for n in range(12)]
    train, other = (lines(tmp_path / f"{name}.jsonl", *(PAIR | {"prompt": n} for n in [*names, name])) for name in ("train", "other"))
    one = config(train, data={"demonstrations": other, "prompts": other, "valid_fraction": 0.3})
    held = {row.prompt for row in inputs.held_out_of(one)}
    assert len(held - {"train"}) >= 3
    for rows, report in (inputs.demonstrations_of(one), inputs.prompts_of(one)):
        assert {row.prompt for row in rows} == {*names, "other"} - held
        assert report.reasons()["held out"] == len(held - {"train"})


def test_a_loss_that_reads_margins_needs_one_in_the_training_pairs(tmp_path):
    none = lines(tmp_path / "none.jsonl", PAIR, PAIR | {"prompt": "q"})
    some = lines(tmp_path / "some.jsonl", PAIR, PAIR | {"prompt": "q", "margin": 0.5})
    valid = lines(tmp_path / "valid.jsonl", PAIR | {"prompt": "v", "margin": 1.0})
    for reward in ({"use_margin": True}, {"loss": "bradley_terry_margin"}):
        with pytest.raises(DataError, match=r"reads a margin, and no pair of .*none.jsonl has one; unset reward.use_margin"):
            check(config(none, valid, reward=reward))
        check(config(some, valid, reward=reward))
    check(config(none, valid))


def real_folder(path, family="gpt2", *, labels=None, **sizes):
    """A model of 40 positions with a tokenizer of 260 ids, its weights nothing but shapes; with `labels` a classifier of so many."""
    path = Path(path)
    shape = {"family": family, "hidden_size": 8, "num_layers": 1, "num_heads": 1}
    config = config_from_hf({**config_from_shape(shape, 260, max_positions=40, eos_id=1)[0].hf, **sizes})
    rng_key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(build_model(config, head="lm" if labels is None else "scalar").init, rng_key)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    save(Loaded(None, params, train_tokenizer([], 260), config), path)
    if labels is not None and labels != 1:
        tensors = load_file(path / "model.safetensors")
        save_file(tensors | {"score.weight": np.zeros((labels, 8), np.float32)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **sizes}))
    return str(path)


def test_a_model_that_is_too_short_or_too_narrow_is_refused_at_the_start(tmp_path):
    rows = lines(tmp_path / "t.jsonl", PAIR, PAIR | {"prompt": "q"})
    folder = real_folder(tmp_path / "m")

    def made(prompt, response, sampled=8, source=folder, **sections):
        limits = {"limits": {"max_prompt_length": prompt, "max_response_length": response}}
        return config(rows, data=limits, model={"source": source}, ppo={"response_length": sampled}, **sections)

    check(made(30, 10))
    for lengths in ((31, 10), (30, 8, 11)):
        with pytest.raises(ValueError, match=r"41 positions, and .*/m has learned 40; lower data.limits.max_prompt_length"):
            check(made(*lengths))
    narrow = real_folder(tmp_path / "narrow", vocab_size=257)
    with pytest.raises(ValueError, match=r"the tokenizer has 258 ids but the model's embedding only 257 rows"):
        check(made(8, 8, source=narrow))
    with pytest.raises(ValueError, match=r"the tokenizer has 258 ids"):
        check(made(8, 8, source=narrow, tokenizer={"source": folder}))


def test_gold_with_learned_positions_is_given_no_more_of_them(tmp_path):
    model = read_config(Path(real_folder(tmp_path / "m")))
    for prompt, response, expected in ((8, 4, (16, 8)), (30, 4, (32, 8)), (30, 30, (20, 20))):
        limits = {"limits": {"max_prompt_length": prompt, "max_response_length": response}}
        found = inputs.gold_limits(from_mapping(SAMPLED | {"data": limits, "ppo": {"response_length": response}}), model)
        assert (found.max_prompt_length, found.max_response_length) == expected


def test_gold_reads_all_that_the_policy_may_write(tmp_path):
    """Responses longer than those of the data are gold's to read to their end: a limit of 8 cut 53 tokens at 16."""
    model = read_config(Path(real_folder(tmp_path / "m", n_positions=400)))
    sections = {"data": {"limits": {"max_prompt_length": 16, "max_response_length": 8}}, "ppo": {"response_length": 53}}
    assert inputs.gold_limits(from_mapping(SAMPLED | sections), model).max_response_length == 106
    # Twice as much, for its tokens are others, but no further than it has learned positions; what the policy's tokens count is whole.
    turned = read_config(Path(real_folder(tmp_path / "r", "llama", max_position_embeddings=80)))
    kept = inputs.gold_limits(from_mapping(SAMPLED | sections), turned)
    assert (kept.max_prompt_length, kept.max_response_length) == (16, 64)


def test_models_that_cannot_do_their_part_are_refused_before_anything_is_trained(tmp_path):
    """Positions of rotary models, gold's head and its labels, a reward model as policy: headers of files say it all."""
    rows = lines(tmp_path / "t.jsonl", PAIR, PAIR | {"prompt": "q"})
    scalar, lm = real_folder(tmp_path / "rm", "llama", labels=1), real_folder(tmp_path / "lm", "llama")
    two = real_folder(tmp_path / "two", "gpt2", labels=2)

    def made(prompt=30, response=10, sampled=10, filter=None, **sources):
        limits = {"limits": {"max_prompt_length": prompt, "max_response_length": response}}
        named = {"gold": {"kind": "model", "source": sources.get("gold", scalar)}, "model": {"source": sources.get("model", lm)}}
        method = sources.get("method", "ppo")
        return config(rows, data=limits, ppo={"response_length": sampled}, filter={"max_new_tokens": filter}, method=method, **named)

    def refusal(**changes):
        with pytest.raises(ValueError) as error:
            inputs.check(made(**changes))
        return str(error.value)

    assert "31 and responses of 10 tokens are 41 positions, and " in refusal(prompt=31)
    assert refusal(sampled=11).endswith("lm has learned 40; lower data.limits.max_prompt_length, data.limits.max_response_length or "
                                        "ppo.response_length.")  # fmt: skip
    inputs.check(made(filter=11))  # PPO filters nothing
    for method in ("frft", "frft+ocrm", "random-subset"):
        assert "lm has learned 40" in (said := refusal(filter=11, method=method)) and said.endswith("or filter.max_new_tokens.")
    assert "no 'scalar' head (score.weight)" in refusal(gold=lm)
    assert "scores 2 labels" in refusal(gold=two)
    assert "is a reward model (score.weight), which writes no text" in refusal(model=scalar)
    short = real_folder(tmp_path / "short", "llama", labels=1, max_position_embeddings=39)
    assert "short has learned 39" in refusal(gold=short)


def test_a_process_that_computes_in_other_widths_is_refused(tmp_path):
    """The draws are the same under JAX_ENABLE_X64, the rest of a training is not, and no stage's hash would know."""
    rows = lines(tmp_path / "t.jsonl", PAIR, PAIR | {"prompt": "q"})
    with jax.enable_x64(True), pytest.raises(ValueError, match="JAX_ENABLE_X64 is on"):
        check(config(rows))
    for flag, name, value in (
        (jax.numpy_dtype_promotion, "NUMPY_DTYPE_PROMOTION", "strict"),
        (jax.numpy_rank_promotion, "NUMPY_RANK_PROMOTION", "raise"),
        (jax.transfer_guard_device_to_device, "TRANSFER_GUARD_DEVICE_TO_DEVICE", "disallow"),
    ):  # it would stop half-way, in jax's words
        with flag(value), pytest.raises(ValueError, match=f"JAX_{name} is {value}, under which the same command stops half-way; unset it"):
            check(config(rows))
    with jax.threefry_partitionable(False), pytest.raises(ValueError, match="JAX_THREEFRY_PARTITIONABLE is off"):
        check(config(rows))
    with jax.enable_x64(True), pytest.raises(ValueError, match="JAX_ENABLE_X64 is on"):
        load(real_folder(tmp_path / "model", "llama"), head="lm")  # what evaluate, generate and embed begin with


def test_looks_at_demonstrations_that_nobody_held_out_are_refused_by_name(tmp_path):
    """Those to held-out prompts are looked at, and another file of demonstrations may have none of them."""
    own = lines(tmp_path / "d.jsonl", {"prompt": "other", "completion": " c"})
    rows = lines(tmp_path / "t.jsonl", *(PAIR | {"prompt": f"q{n}"} for n in range(9)))
    with pytest.raises(DataError, match=r"sft\.eval_steps asks for looks at held-out rows, and there are none: name data.valid"):
        inputs.held_out_demonstrations_of(config(rows, data={"demonstrations": own}))
