"""docs/extending.md to the letter: its blocks in a temporary folder, its commands, and by figures what each extension did."""

import json
import re
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf import cli, plugins, sharding
from jaxrlhf.algorithms.reward import score_pairs
from jaxrlhf.data.tables import read_pair_table, read_table
from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.pipeline.inputs import gold_identity
from jaxrlhf.pipeline.stages.reward_update import _read_by
from jaxrlhf.plugins import source_of
from jaxrlhf.recipe import load_config
from jaxrlhf.sharding import mesh
from jaxrlhf.storage.record import read_record

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = {name: text for name, text in re.findall(r"^`([\w.]+)`\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)}
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
REFUSED = re.findall(r"^\| `(--[^`]+)` \| (.+) \|$", PAGE, re.MULTILINE)
MODULES = [name.removesuffix(".py") for name in FILES if name.endswith(".py")]


def forget() -> None:
    """The modules of the page, as a new process would not know them."""
    for name in MODULES:
        sys.modules.pop(name, None)
        plugins._SOURCES.pop(name, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page's files in a folder of their own, which is the current one; its runs see one of the four fake devices."""
    made, make = tmp_path_factory.mktemp("extending"), sharding.make_mesh
    for name, text in FILES.items():
        (made / name).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(mesh, "make_mesh", lambda *axes: make(*axes, devices=jax.devices()[:1]))
        yield made
    forget()


def command(line: str) -> int:
    program, *argv = shlex.split(line)
    assert program == "jaxrlhf"
    return cli.main(argv)


@pytest.fixture(scope="module")
def ran(folder):
    assert [command(line) for line in COMMANDS] == [0] * len(COMMANDS)
    return folder / "runs"


def stages(run: Path) -> dict[str, Path]:
    return {link.name[3:]: link.resolve() for link in (run / "stages").iterdir()}


def lines(run: Path, stage: str, round: int) -> list[dict]:
    return [line for line in read(run / "metrics.jsonl") if (line["stage"], line["round"]) == (stage, round)]


def test_a_run_ends_with_its_report(ran):
    for name in ("mine", "plain"):
        page = (ran / name / "report.html").read_text(encoding="utf-8")
        assert "<svg" in page and name in page


def test_the_page_is_short_and_names_what_it_holds():
    assert {*FILES} == {"my_update.py", "my_pair_loss.py", "my_policy_loss.py", "my_gold.py", "my_row.py", "recipe.yaml"}
    assert all(text.count("\n") <= 20 for text in FILES.values()) and len(COMMANDS) == 2 and len(REFUSED) == PAGE.count("| `--") >= 8
    assert "class " not in "".join(FILES.values())


def test_the_column_and_the_weights_of_the_update_reach_the_pair_loss(ran):
    """One step over all pairs a training: its metrics are means over all of them."""
    found = stages(ran / "mine")
    (first,), (second,) = (lines(ran / "mine", "reward", number) for number in (1, 2))
    assert first["pair/policy_gap"] == 0 and first["pair/weight"] == 1  # before any update: the default, and no weights
    gap = read_pair_table(found["r2-update"] / "pairs.parquet")[1].columns["policy_gap"]
    weights = np.load(found["r2-update"] / "weights.npy", allow_pickle=False)
    assert gap.std() > 0.1 and weights.std() > 0.1
    np.testing.assert_allclose(weights, 2 / (1 + np.exp(np.clip(gap, -30, 30))), rtol=1e-5)
    assert second["pair/policy_gap"] == pytest.approx(gap.mean(), rel=1e-4)
    assert second["pair/weight"] == pytest.approx(weights.mean(), rel=1e-5)
    summary = json.loads((ran / "mine" / "summary.json").read_text())
    assert summary["rounds"][2]["ess"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-4)
    assert lines(ran / "mine", "update", 2)[0]["weights/ess"] == summary["rounds"][2]["ess"]


def test_the_loss_is_what_the_function_says(ran):
    """The training's loss, from the stored scores: round 1's reward model is where round 2's starts, before its one step."""
    found = stages(ran / "mine")
    assert read_record(found["r2-reward"])["inputs"]["previous"] == found["r1-reward"].name  # reward_start: previous
    loaded = jaxrlhf.load(found["r1-reward"], head="scalar")
    tokens = read_pair_table(found["r2-update"] / "pairs.parquet")[1]
    chosen, rejected = score_pairs(loaded.model, loaded.params, tokens, batch_size=64, mesh=None)
    weights = np.load(found["r2-update"] / "weights.npy", allow_pickle=False)
    expected = np.mean(weights * np.logaddexp(0, -(chosen - rejected + 0.1 * tokens.columns["policy_gap"])))
    assert lines(ran / "mine", "reward", 2)[0]["loss/pair"] == pytest.approx(expected, rel=1e-4)


def test_the_policy_loss_changes_the_policy(ran):
    """Both runs have the same round 1 but for the policy's loss."""
    mine, plain = stages(ran / "mine"), stages(ran / "plain")
    assert all(mine[name] == plain[name] for name in ("sft", "pairs", "r1-reward")) and mine["r1-policy"] != plain["r1-policy"]
    a, b = (jax.tree.leaves(jaxrlhf.load(found["r1-policy"]).params) for found in (mine, plain))
    assert max(float(abs(x - y).max()) for x, y in zip(a, b, strict=True)) > 1e-4
    (first, *_), (ppo, *_) = (lines(ran / name, "policy", 1) for name in ("mine", "plain"))
    assert first["rollout/score"] == ppo["rollout/score"] and first["loss/policy"] != ppo["loss/policy"]
    assert "ppo/entropy" in first and "ppo/ratio" not in first and "ppo/ratio" in ppo


def test_gold_is_the_functions(ran, folder):
    scope: dict = {}
    exec(FILES["my_gold.py"], scope)
    summary = json.loads((ran / "mine" / "summary.json").read_text())
    found = stages(ran / "mine")
    for number, name in enumerate(("sft-evaluation", "r1-evaluation", "r2-evaluation")):
        samples, _ = read_table(found[name] / "samples.parquet")
        scores = scope["score"](samples["prompt"], samples["response_1"])
        assert summary["rounds"][number]["gold"] == pytest.approx(np.mean(scores), rel=1e-5) and np.std(scores) > 0
    pairs, _ = read_table(found["pairs"] / "train.parquet")
    assert all(
        a >= b for a, b in zip(*(scope["score"](pairs["prompt"], pairs[side]) for side in ("chosen", "rejected")), strict=True)
    )  # ties go to the first


def test_the_row_is_mine_and_the_recipe_moves_its_reference(ran):
    found = stages(ran / "mine")
    inputs = read_record(found["r2-policy"])["inputs"]
    assert inputs["reference"] == inputs["start"] == found["r1-policy"].name != found["sft"].name
    first = lines(ran / "mine", "policy", 2)[0]
    assert first["kl/penalty"] == 0 != first["kl/sft"]  # to the policy of round 1, which is where round 2 starts
    assert json.loads((ran / "mine" / "summary.json").read_text())["method"] == "my_row:MINE"


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_what_is_refused_says_what_the_page_says(folder, capsys, change, said):
    assert command(f"jaxrlhf run recipe.yaml --name refused {change}") == 1
    error = capsys.readouterr().err
    assert error.startswith("jaxrlhf: ") and said in error and "Traceback" not in error
    assert not (folder / "runs" / "refused").exists()


def test_a_change_of_code_builds_what_depends_on_it_again(ran, folder, monkeypatch, tmp_path):
    """Hashes by the text of each module: another folder with modules of the same names, of which one differs, shares all else."""
    config = load_config(folder / "recipe.yaml")

    def facts() -> dict:
        return {
            "update": _read_by("my_update:residual", config),
            "pair loss": source_of(config.reward.loss),
            "policy loss": source_of(config.ppo.loss),
            "gold": gold_identity(config),
        }

    before = facts()
    for module, what in (("my_update", "update"), ("my_pair_loss", "pair loss"), ("my_policy_loss", "policy loss"), ("my_gold", "gold")):
        other = tmp_path / module
        other.mkdir()
        for name, text in FILES.items():
            (other / name).write_text(text + ("# changed\n" if name == f"{module}.py" else ""), encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(other)
            forget()
            after = facts()
        assert {name for name in before if before[name] != after[name]} == {what}
    forget()
