"""The plan of a run: its programs are the run's own, its figures are counted again here another way, and what it says of them is right."""

import argparse
import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import yaml

from jaxrlhf import sharding
from jaxrlhf.cli import main
from jaxrlhf.commands import plan as command
from jaxrlhf.files import check_replaceable
from jaxrlhf.models.hub import initialise
from jaxrlhf.models.hub.published import KNOWN, known_shape
from jaxrlhf.models.model import build_model
from jaxrlhf.models.transformer import DecoderConfig
from jaxrlhf.monitoring.recompiles import count_compilations
from jaxrlhf.pipeline.run import run
from jaxrlhf.plan import compile, memory, plan
from jaxrlhf.plan.compile import compiled, extrapolated
from jaxrlhf.plan.counts import counts_of
from jaxrlhf.plan.devices import DEVICES, device_of_kind, own_device
from jaxrlhf.plan.formulas import temporaries
from jaxrlhf.plan.memory import GIB, Planned, advice, room
from jaxrlhf.plan.models import gold_model, models_of, planned_models
from jaxrlhf.plan.phases import phases_of, policy_phases
from jaxrlhf.plan.plan import Plan
from jaxrlhf.plan.planner import Phase, Planner, Program, Read
from jaxrlhf.plan.shapes import bytes_on_device
from jaxrlhf.plan.table import MADE_BY
from jaxrlhf.plan.training import sft_phase
from jaxrlhf.recipe import load_config
from jaxrlhf.sharding import mesh

PUBLISHED = {
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-1b-deduped": 1_011_781_632,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "gpt2-xl": 1_557_611_200,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
}


def planner_of(config, mesh=None, **rows):
    return Planner(config, planned_models(config, uses_encoder=False), counts_of(config, **rows), mesh)


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_shapes_have_the_published_number_of_parameters(name):
    """Layers are all of one size: two of them tell the rest."""
    shape = known_shape(name)

    def count(layers):
        params = jax.eval_shape(build_model(replace(shape, num_layers=layers)).init, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    one, two = count(1), count(2)
    assert one + (shape.num_layers - 1) * (two - one) == PUBLISHED[name]


def test_every_known_shape_is_one_the_package_computes():
    assert all(known_shape(name).num_layers > 5 for name in KNOWN) and known_shape("somebody/model") is None


def zeros(tree):
    """What a run would pass: arrays, a key, and Python's own number where the type is weak."""

    def one(leaf):
        if leaf.weak_type:
            return 0.0
        return jax.random.key(0) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(one, tree)


def test_the_programs_are_those_of_the_run(tmp_path, tiny_config, monkeypatch):
    """After a run, none of its plan's programs compiles again when it is called with the plan's shapes: they are the same functions."""
    make = sharding.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda *axes: make(*axes, devices=jax.devices()[:1]))
    config = tiny_config(tmp_path, method="ocrm")
    phases = phases_of(planner_of(config, sharding.mesh_of(config.mesh)))
    run(config)
    assert [one.title for one in phases][:3] == ["SFT: step", "pairs: sample", "reward: step"]
    for one in phases:
        assert one.function._cache_size() > 0, f"{one.title}: the run never called this function"
        arguments = zeros(one.arguments)
        with count_compilations() as watch:
            one.function(*arguments)
        assert not watch.seen, f"{one.title}: the run called it with other shapes"
    assert {one.loop for one in phases if one.name.startswith("sample")} == {8 - 1}  # the first token is the prompt's own pass
    calls = {one.title: one.calls for one in phases}
    assert (calls["SFT: step"], calls["policy: update (round 1)"], calls["policy: update (from round 2 on)"]) == (3, 3, 3)
    assert (calls["pairs: sample"], calls["evaluation: sample"]) == (2 * 2, 2 * 3)


def test_on_a_mesh_the_models_are_those_that_are_loaded(tmp_path, tiny_config):
    """The same functions, so the same programs: they keep the rows of activations cut where parameters are cut."""
    mesh = sharding.make_mesh(1, 4, 1)
    planner = planner_of(tiny_config(tmp_path, model__remat="dots", gold={"kind": "model", "source": "gpt2", "dtype": "bfloat16"}), mesh)
    loaded = [
        initialise(shape, key=jax.random.key(0), head=head, dtype="float32", remat="dots", logits_chunk=None, mesh=mesh).model
        for shape, head in ((planner.subjects.base, "lm"), (planner.subjects.reward, "scalar"))
    ]
    assert list(models_of(planner.config, planner.subjects, mesh)) == loaded
    gold = replace(planner.subjects.base, num_layers=2)
    assert (
        gold_model(planner.config, gold, mesh) == initialise(gold, key=jax.random.key(0), head="scalar", dtype="bfloat16", mesh=mesh).model
    )


@pytest.fixture(scope="module")
def sft(tmp_path_factory, tiny_config):
    planner = planner_of(tiny_config(tmp_path_factory.mktemp("plan")))
    return planner, memory.planned(sft_phase(planner), compiled(sft_phase(planner), None), None)


def test_memory_is_parameters_moments_gradients_and_the_rest(sft):
    planner, one = sft
    parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(planner.policy))
    assert one.parts["policy"] == one.parts["gradients"] == parameters
    assert one.parts["optimizer"] == 2 * parameters + 4 * 4  # three counters and the learning rate
    B, width = planner.config.sft.batch_size, 17 + 8
    assert one.parts["batch"] - one.program.fresh == B * (width * (4 + 1) + 1 + 4)
    assert one.total == sum(one.parts.values())
    state_and_batch = 3 * parameters + 16 + B * (width * 5 + 5)
    # With the step's number, without the row numbers, which it does not read. The last rate it keeps where the step is not finite.
    assert one.program.arguments == state_and_batch + 4 - 4 * B
    assert one.program.temp == one.parts["activations"] + parameters


def test_what_is_held_beside_a_program(tmp_path, tiny_config):
    """24 bytes a parameter learn, and every frozen model adds its 4; π_SFT from the round on in which it is not the reference."""
    planner = planner_of(tiny_config(tmp_path, method="ocrm"))
    held = {one.title: set(one.held) for one in policy_phases(planner)}
    trained = {"policy", "critic", "optimizer", "reference", "reward"}
    assert held["policy: sample (round 1)"] == held["policy: update (round 1)"] == trained
    assert held["policy: score (from round 2 on)"] == trained | {"π_SFT"}
    size = {name: bytes_on_device(tree, None) for name, tree in next(policy_phases(planner)).held.items()}
    assert size["policy"] == size["reference"] and size["critic"] == size["reward"]
    assert 0 < size["optimizer"] - 2 * (size["policy"] + size["critic"]) <= 32  # counters and learning rates
    rloo = planner_of(tiny_config(tmp_path, method="rloo"))
    assert {frozenset(one.held) for one in policy_phases(rloo)} == {frozenset(trained - {"critic"})}
    ensemble = planner_of(tiny_config(tmp_path, method="ppo-ensemble", reward__ensemble_size=3, rounds=1))
    score = next(one for one in policy_phases(ensemble) if one.name == "score")
    assert bytes_on_device(score.held["reward"], None) == 3 * bytes_on_device(score.held["critic"], None)
    names = [one.title for one in phases_of(planner_of(tiny_config(tmp_path, method="dpo")))]
    assert "policy: step" in names and "policy: log-probs of pairs" in names and "reward: step" not in names


def test_lora_learns_less_and_shares_its_base(tmp_path, tiny_config):
    planner = planner_of(tiny_config(tmp_path, method="ppo", rounds=1, lora__r=2))
    update = next(one for one in policy_phases(planner) if one.name == "update")
    assert "reference" not in update.held
    whole = next(one for one in policy_phases(planner_of(tiny_config(tmp_path, method="ppo", rounds=1))) if one.name == "update")
    assert bytes_on_device(update.learned["policy"], None) < bytes_on_device(whole.learned["policy"], None) / 2
    assert bytes_on_device(update.held["policy"], None) > bytes_on_device(whole.held["policy"], None)


def test_offloaded_models_are_on_the_device_in_their_turn(tmp_path, tiny_config):
    planner = planner_of(tiny_config(tmp_path, method="ocrm", model__offload_frozen=True))
    held = {one.title: set(one.held) for one in policy_phases(planner)}
    assert held["policy: sample (round 1)"] == held["policy: update (from round 2 on)"] == {"policy", "critic", "optimizer"}
    assert held["policy: score (from round 2 on)"] == {"policy", "critic", "optimizer", "reference in its turn"}


def test_devices_cut_parameters_and_rows(tmp_path, tiny_config, sft):
    mesh = sharding.make_mesh(1, 4, 1)
    planner = planner_of(tiny_config(tmp_path), mesh)
    alone = sft[1]
    one = memory.planned(sft_phase(planner), compiled(sft_phase(planner), mesh), mesh)
    assert one.parts["optimizer"] < 0.3 * alone.parts["optimizer"]
    assert one.parts["batch"] - one.program.fresh == (alone.parts["batch"] - alone.program.fresh) / 4
    assert one.program.flops < 0.35 * alone.program.flops
    # Parameters are gathered and gradients scattered at least once: 3/4 of them each.
    assert one.program.sent > 2 * 0.75 * 0.9 * alone.parts["policy"] and alone.program.sent == 0


def test_deep_models_follow_from_shallow_ones(tmp_path, tiny_config):
    config = tiny_config(tmp_path, model__shape__num_layers=10)
    planner = planner_of(config)
    shallow = [sft_phase(replace(planner, subjects=planner.subjects.at_depth(n))) for n in (2, 4)]
    told = extrapolated(10, (2, 4), [compiled(one, None) for one in shallow])
    exact = compiled(sft_phase(planner), None)
    assert told.layers == (2, 4) and exact.layers == ()
    assert told.flops == pytest.approx(exact.flops, rel=1e-3)
    assert told.temp == pytest.approx(exact.temp, rel=0.05)


def test_steps_of_deep_models_are_extrapolated_and_passes_are_not(monkeypatch):
    """What a pass needs does not grow by the layer: extrapolated, it was up to 1.7 times what it is."""
    monkeypatch.setattr(compile, "compiled", lambda phase, mesh: replace(PROGRAM, temp=10 * phase.layers))
    phases = [phase_of(function=1, layers=16), phase_of(function=2, layers=16, learned=None), phase_of(function=3, layers=8)]

    def at(depth):
        return [replace(one, layers=min(one.layers, depth)) for one in phases]

    found = compile.compile_all(phases, at, None, {}, exact=False, report=lambda phase, program: None)
    assert [one.layers for one in found] == [(2, 4), (), ()] and [one.temp for one in found] == [160, 160, 80]
    exact = compile.compile_all(phases, at, None, {}, exact=True, report=lambda phase, program: None)
    assert [one.layers for one in exact] == [(), (), ()]


def phase_of(**changes):
    config = {"stage": "SFT", "name": "step", "knobs": ("sft.gradient_accumulation_steps", "model.remat", "mesh.fsdp")}
    held = {"policy": {"backbone": {"final_norm": {"scale": jax.ShapeDtypeStruct((64,), jnp.float32)}}}}
    rest = {"function": None, "arguments": (), "held": held, "rows": (), "calls": 10, "tokens": 1000, "layers": 4, "learned": held}
    rest |= {"reads": (Read(SHAPE, "scalar", rows=8, width=64, outputs=64, learns=True),)}
    return Phase(**(config | rest | changes))


SHAPE = DecoderConfig("gpt2", 100, 64, 4, 4, 4, 16, 256, 64, positions="learned")
PROGRAM = Program(arguments=0, fresh=0, temp=0, code=0, flops=4e14, traffic=2.4e12, sent=0, seconds=1.0)


def test_advice_is_the_least_that_fits(tmp_path, tiny_config):
    """80 GiB, of which 73.6 are usable: 40 of parameters and 120 of activations want microbatches of a quarter."""
    one = Planned(phase_of(), replace(PROGRAM, temp=120.0 * GIB), {"policy": 40.0 * GIB, "activations": 120.0 * GIB, "batch": 0.0})
    config = tiny_config(tmp_path, sft__batch_size=32)
    tips = advice(one, DEVICES["h100"], config, None)
    by_name = {tip.setting.rsplit(" ", 1)[0]: tip for tip in tips}
    assert [tip.saves for tip in tips] == sorted((tip.saves for tip in tips), reverse=True)
    found = by_name["sft.gradient_accumulation_steps"]
    assert found.setting == "sft.gradient_accumulation_steps 4" and found.saves == 90.0 * GIB
    assert one.total - found.saves <= room(DEVICES["h100"]) < one.total - 60.0 * GIB
    full = replace(one.phase.reads[0], remat="full")
    share = temporaries(one.phase, [full], None) / temporaries(one.phase, one.phase.reads, None)
    assert 0.2 < share < 0.5  # one of four layers is there while it is computed again, with the gradients of its arrays
    assert by_name["model.remat"].saves == pytest.approx((1 - share) * 120.0 * GIB)
    few = tiny_config(tmp_path, sft__batch_size=2)
    assert "sft.gradient_accumulation_steps 2" in {tip.setting for tip in advice(one, DEVICES["h100"], few, None)}
    whole = sharding.make_mesh(4, 1, 1)
    cut = next(tip for tip in advice(one, DEVICES["h100"], config, whole) if tip.setting.startswith("mesh."))
    assert cut.saves == 30.0 * GIB
    passes = Planned(phase_of(learned=None, knobs=("ppo.forward_batch_size",)), PROGRAM, {"activations": 100.0 * GIB, "batch": 0.0})
    assert [tip.setting for tip in advice(passes, DEVICES["h100"], tiny_config(tmp_path), None)] == ["ppo.forward_batch_size 8"]


def test_time_is_the_slowest_of_three():
    one = Planned(phase_of(), replace(PROGRAM, sent=1e9), {})
    seconds = one.seconds(DEVICES["h100"], "bfloat16")
    assert seconds == pytest.approx({"compute": 4e14 / (0.4 * 989e12), "memory": 2.4e12 / (0.7 * 3350e9), "exchange": 1e9 / (0.7 * 450e9)})
    found = SimpleNamespace(phases=[one], config=SimpleNamespace(model=SimpleNamespace(dtype="bfloat16")))
    found.dtype = lambda phase: "bfloat16"
    assert Plan.seconds(found, one, DEVICES["h100"]) == max(seconds.values())  # type: ignore[arg-type]
    assert one.seconds(DEVICES["h100"], "float32")["compute"] == pytest.approx(4e14 / (0.4 * 494e12))


def test_exact_products_take_the_time_of_exact_products(tiny_config, tmp_path):
    """float32 at the highest precision runs without tensor cores: 67 TFLOP/s of an H100, not 494."""
    one, gold = Planned(phase_of(), PROGRAM, {}), Planned(phase_of(name="gold scores"), PROGRAM, {})

    def compute(planned, **model):
        made = Plan(tiny_config(tmp_path, model=model), None, None, 1, None, {}, [], [])  # type: ignore[arg-type]
        return planned.seconds(DEVICES["h100"], made.dtype(planned))["compute"] * 0.4e12 / 4e14

    assert compute(one) == compute(gold) == pytest.approx(1 / 67)
    assert compute(one, matmul_precision="default") == pytest.approx(1 / 494) and compute(one, dtype="bfloat16") == pytest.approx(1 / 989)
    assert compute(gold, matmul_precision="default") == pytest.approx(1 / 67)


def test_devices_by_name_by_kind_and_of_your_own():
    assert device_of_kind("NVIDIA H100 80GB HBM3") is DEVICES["h100"] and device_of_kind("cpu") is None
    assert device_of_kind("TPU v5 lite") is DEVICES["v5e"] and device_of_kind("TPU v5") is DEVICES["v5p"]
    assert own_device(40, None, None, DEVICES["h100"]) == DEVICES["h100"]._replace(memory=40)
    own = own_device(10, 20, 30, None)
    assert (own.memory, own.peak("bfloat16"), own.bandwidth) == (10, 20e12, 30)


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"model": {"source": "somebody/model"}}, [], "give a folder that holds its config.json"),
        ({}, ["--device", "h900"], "--device 'h900' is unknown; known are h200, h100"),
        ({}, ["--memory", "40"], "needs all of --memory GIB, --peak TFLOPS and --bandwidth GB/S"),
        ({}, ["--device", "h100", "--peak", "-1"], "--peak -1.0 must be a number above 0"),
        ({}, ["--rows", "0"], "--rows 0 must be at least 1"),
        ({}, ["--exact"], "--exact says how --compile compiles, and nothing is compiled without it"),
        ({}, ["--figure", "plan.txt"], "--figure plan.txt: no picture of that kind can be written"),
        ({"sft": {"batch_size": 6}}, [], "sft.batch_size 6 does not divide over 4 data shards; try 4."),
    ],
)
def test_what_cannot_work_is_said_before_anything_compiles(changes, words, message, tmp_path, tiny_mapping, monkeypatch, capsys):
    raw = tiny_mapping(tmp_path)
    for section, values in changes.items():
        raw[section] = raw[section] | values
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(command, "start_devices", lambda count: None)
    monkeypatch.setattr(plan, "compile_all", lambda *a, **k: pytest.fail("compiled"))
    assert main(["plan", str(tmp_path / "c.yaml"), *([] if "--exact" in words else ["--compile"]), *words]) == 1
    assert message in capsys.readouterr().err


def test_the_command_tells_all(tmp_path, tiny_mapping, monkeypatch, capsys):
    """Tables, JSON and a picture, from programs of made-up size: one phase of them too large."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_mapping(tmp_path)))
    asked = []
    monkeypatch.setattr(command, "start_devices", asked.append)

    def programs(phases, *rest, report, **how):
        return [replace(PROGRAM, temp=90 * GIB if one.title == "SFT: step" else GIB) for one in phases]

    monkeypatch.setattr(plan, "compile_all", programs)
    words = ["--compile", "--devices", "4", "--device", "h100, v5p"]
    words += ["--json", str(tmp_path / "p.json"), "--figure", str(tmp_path / "p.png")]
    assert main(["plan", str(tmp_path / "c.yaml"), *words, "--sft.max_steps", "2"]) == 0
    out = capsys.readouterr().out
    assert asked == [4] and "max_steps: 2" in out and "Predicted, not measured" in out
    assert "compiled for cpu" in out and "formula / compiler" in out
    assert out.count("DOES NOT FIT: SFT: step") == 2 and "sft.gradient_accumulation_steps" in out and "Google TPU v5p" in out
    told = json.loads((tmp_path / "p.json").read_text())["tiny"]
    assert told["phases"][0]["calls"] == 2 and told["phases"][0]["parts"]["activations"] > 89 * GIB
    assert [one["device"]["name"] for one in told["on"]] == ["NVIDIA H100 SXM", "Google TPU v5p"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    check_replaceable(tmp_path / "p.png", MADE_BY)  # the same command may write both again
    check_replaceable(tmp_path / "p.json", '"of_bandwidth": ')


def test_rows_that_nobody_states_are_not_counted():
    counts = counts_of(load_config("tldr_pythia1b_ocrm.yaml"))
    assert counts.sft_steps is None and counts.evaluation_prompts is None and counts.reward_steps == 1451 and counts.ppo_updates == 195
    counts = counts_of(load_config("tldr_pythia1b_ocrm.yaml"), rows=116_722, valid_rows=6_447)
    assert (counts.sft_steps, counts.evaluation_prompts) == (912, 6_447)


def test_a_method_that_updates_once_is_counted_once(tmp_path, tiny_config):
    rounds = counts_of(tiny_config(tmp_path, method="frft", rounds=3)).rounds
    assert [one.reward_update for one in rounds] == [None, "nearest", None] and [one.fits_reward for one in rounds] == [True, True, False]


def test_start_devices_refuses_none():
    with pytest.raises(ValueError, match="--devices 0 must be at least 1"):
        command.start_devices(0)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert parser.parse_args([]).devices is None
