"""What a run would do to the results in its folder, said before it does anything. Stages are recorded and nothing is trained."""

import json
from types import SimpleNamespace

import pytest
import yaml

from jaxrlhf import cli
from jaxrlhf.config.names import WRITTEN
from jaxrlhf.files import REPORT_MARKS
from jaxrlhf.pipeline import run as run_module
from jaxrlhf.pipeline.foresight import check_ours, finished_here, forecast, foresee, outlook
from jaxrlhf.pipeline.run import dry_run, run
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.recipe import MARK, ConfigError, to_yaml
from jaxrlhf.storage.stage import Stage
from jaxrlhf.sweep.sweep import jobs_of, read_finished, sweep

RESULT = {"due": True, "forced": False, "rounds": 1, "value": 1.0, "threshold": 1.0, "when": "kl"}
RESULT |= {"accuracy_valid": None, "pairs": 1, "update": "", "baselines": {}}
STAGES = ["tokenizer", "sft", "pairs", "sft-evaluation", "r1-reward", "r1-policy", "r1-evaluation"]


class Stopped(Exception):
    """What stands for a kill before a stage."""


@pytest.fixture
def recorded(monkeypatch):
    """Every stage is built by writing its record; the names of those that were built. One named in `stop` ends the process."""
    built: list[str] = []
    stop: set[str] = set()
    build = RunContext.build

    def record(self, stage, fn, **how):
        def write(folder):
            if stage.name in stop:
                raise Stopped
            built.append(stage.name)
            return dict(RESULT)

        return build(self, stage, write, **how)

    monkeypatch.setattr(RunContext, "build", record)
    return SimpleNamespace(built=built, stop=stop)


@pytest.fixture
def config(tiny_config, tmp_path):
    return lambda output=tmp_path / "runs", **changes: tiny_config(output, **{"rounds": 1, **changes})


def test_all_hashes_are_known_before_anything_is_built(config, recorded):
    before = foresee(config())
    assert [done.name for done in before.stages] == STAGES and not any(done.cached for done in before.stages)
    folder = run(config())
    assert recorded.built == STAGES
    assert {name: hash for name, (hash, _) in finished_here(config()).items()} == {done.name: done.hash for done in before.stages}
    assert all(done.cached for done in foresee(config()).stages)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".stages", "tiny"]


def test_another_recipe_under_the_name_is_refused_with_what_it_would_replace(config, recorded):
    folder = run(config())
    kept = {name: (folder / name).read_bytes() for name in ("config.yaml", "summary.json")}
    with pytest.raises(ConfigError) as error:
        run(config(reward__learning_rate=0.5))
    said = str(error.value).splitlines()
    assert said[0] == f"{folder} has results of another recipe (r1-reward, r1-policy, r1-evaluation)."
    assert said[1:3] == ["  changed: reward.learning_rate 0.001 → 0.5", "  kept: tokenizer, sft, pairs, sft-evaluation"]
    assert said[3] == "  to build: r1-reward, r1-policy, r1-evaluation" and "--replace" in said[4] and "--name" in said[4]
    with pytest.raises(ConfigError, match=r"recipe \(sft\)\.\n.*\n  kept: tokenizer\n  to build: sft\n"):  # and no stage behind it
        run(config(sft__learning_rate=0.5), until="sft")
    assert kept == {name: (folder / name).read_bytes() for name in kept} and recorded.built == STAGES


def test_what_changes_no_result_goes_on_unasked(config, recorded, capfd):
    run(config())
    for changes in ({"log__every": 7}, {"checkpoint__every": 3}, {"mesh__data": 4}, {"model__remat": "full"}):
        found = outlook(config(**changes))
        assert not found.replaced and not found.notes
    capfd.readouterr()
    run(config(standalone=True))
    assert recorded.built == STAGES and "note:" not in capfd.readouterr().err
    run(config(rounds=2, method="retrain"))  # more rounds of the same first one
    assert recorded.built[len(STAGES) :] == ["r2-update", "r2-reward", "r2-policy", "r2-evaluation"]
    with pytest.raises(ConfigError, match=r"changed: rounds 2 → 1"):
        run(config(rounds=1, method="retrain"))


def test_replaced_and_stopped_it_goes_on_and_the_old_summary_is_there_until_the_new_one(config, recorded, capfd):
    folder = run(config())
    old = (folder / "summary.json").read_bytes()
    recorded.stop.add("pairs")
    other = config(sft__learning_rate=0.5)
    with pytest.raises(Stopped):
        run(other, replace=True)
    assert "note: replaces sft, pairs, sft-evaluation, r1-reward, r1-policy, r1-evaluation in" in capfd.readouterr().err
    assert (folder / "summary.json").read_bytes() == old and list(finished_here(other)) == ["tokenizer", "sft"]
    recorded.stop.clear()
    run(other)  # the same recipe: nobody is asked again
    assert json.loads((folder / "summary.json").read_bytes())["finished"] and list(finished_here(other)) == STAGES
    with pytest.raises(ConfigError, match=r"changed: sft\.learning_rate 0\.5 → 0\.01"):
        run(config())
    run(config(), replace=True)
    assert recorded.built.count("r1-policy") == 2  # the first recipe's stages were in the store still


def test_a_run_that_was_stopped_goes_on_and_a_changed_recipe_is_said(config, recorded, capfd):
    recorded.stop.add("r1-policy")
    with pytest.raises(Stopped):
        run(config())
    with pytest.raises(Stopped):
        run(config(ppo__kl_coef=0.5))
    assert "was begun with another recipe (ppo.kl_coef 0.05 → 0.5); no finished stage depends on that" in capfd.readouterr().err
    recorded.stop.clear()
    run(config(ppo__kl_coef=0.5))
    assert recorded.built == STAGES and "note:" not in capfd.readouterr().err.replace("note: evaluation", "")


def test_a_raised_version_is_said_to_be_one_and_the_run_goes_on(config, recorded, capfd, monkeypatch):
    run(config())
    known = Stage.__post_init__

    def raised(self):
        known(self)
        if self.function == "reward":
            object.__setattr__(self, "version", self.version + 1)

    monkeypatch.setattr(Stage, "__post_init__", raised)
    run(config())
    said = capfd.readouterr().err
    assert (
        "note: r1-reward was made by another version of jaxrlhf (0.1.0), which computes it otherwise (version 3 of the stage, now 4)"
        in said
    )
    assert recorded.built[len(STAGES) :] == ["r1-reward", "r1-policy", "r1-evaluation"]


def test_a_broken_config_yaml_blocks_nothing(config, recorded):
    folder = run(config())
    for content in (b"", b"name: [", b"\xff\xfe\x00", b"- 1\n", b"nosuch: 1\n"):
        (folder / "config.yaml").write_bytes(content)
        check_ours(config())
        assert not outlook(config()).replaced and not outlook(config(sft__learning_rate=0.5)).replaced  # no recipe is known to differ
    notes = outlook(config(reward__learning_rate=0.5)).notes
    assert notes == ["note: r1-reward was made by a recipe that is not known, for config.yaml beside it cannot be read; "
                     "it is built again, and so is what follows from it"]  # fmt: skip
    run(config())
    assert recorded.built == STAGES and yaml.safe_load((folder / "config.yaml").read_text())["rounds"] == 1


@pytest.mark.parametrize("seeds", [(), (0,)])
def test_arms_say_that_their_folder_is_ours_whatever_its_config_yaml_says(config, recorded, seeds):
    several = config(arms={"a": {}, "b": {"ppo.kl_coef": 0.5}})
    go = (lambda: sweep(several, seeds)) if seeds else (lambda: run(several))
    folder = go()
    (folder / "report.html").write_text("<p>")
    for path in folder.rglob("config.yaml"):
        path.write_text(path.read_text().removeprefix(MARK))  # by an earlier version
    for content in (None, b"", b"name: [", b"name: mine\n"):
        (folder / "config.yaml").unlink() if content is None else (folder / "config.yaml").write_bytes(content)
        check_ours(several)
    built = len(recorded.built)
    go()
    assert len(recorded.built) == built and (folder / "config.yaml").read_text().startswith(MARK)
    for recipe in folder.rglob("config.yaml"):
        recipe.unlink()
    (folder / "config.yaml").write_text("name: mine\n")
    for stages in [*folder.glob("*/stages"), *folder.glob("*/*/stages")]:
        stages.rename(stages.with_name("others"))
    with pytest.raises(ConfigError, match=r"config\.yaml was not written by jaxrlhf"):
        check_ours(several)


@pytest.mark.parametrize("made_by", REPORT_MARKS)
def test_a_report_of_ours_is_replaced_and_the_recipe_beside_it_is_not(config, tmp_path, made_by):
    folder = tmp_path / "runs" / "tiny"
    (folder / "figures").mkdir(parents=True)
    (folder / "report.html").write_text(f"<p>{made_by}</p>")
    check_ours(config())
    (folder / "config.yaml").write_text("# mine\n")
    with pytest.raises(ConfigError, match=r"config\.yaml was not written by jaxrlhf"):
        check_ours(config())


def test_a_single_stage_asks_for_itself_alone_and_leaves_what_follows(config, recorded, capfd):
    folder = run(config())
    written, other = (folder / "config.yaml").read_bytes(), config(reward__learning_rate=0.5)
    run(other, until="sft")  # the same SFT
    said = "r1-reward, r1-policy, r1-evaluation in"
    assert said in capfd.readouterr().err and recorded.built == STAGES
    run(other, until="reward", replace=True)
    assert recorded.built[len(STAGES) :] == ["r1-reward"] and finished_here(other).keys() == set(STAGES)
    assert (folder / "config.yaml").read_bytes() == written  # what the policy in the folder was made by
    with pytest.raises(ConfigError, match=r"results of another recipe \(r1-policy, r1-evaluation\)\."):
        run(other)
    (note,) = outlook(config()).notes
    assert "r1-reward was made by another recipe, up to a single stage" in note
    run(other, replace=True)
    assert "0.5" in (folder / "config.yaml").read_text() and not outlook(other).notes


def test_a_look_at_a_url_reads_and_writes_no_stage(config, recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXRLHF_WORK", str(tmp_path / "one"))
    there = config(output="memory://foresight/runs")
    run(there)
    monkeypatch.setenv("JAXRLHF_WORK", str(tmp_path / "two"))
    assert "7 stages, 7 finished, 0 to build" in dry_run(there) and not (tmp_path / "two").exists()
    (found,) = (outlook(config(output=there.output, reward__learning_rate=0.5)),)
    assert found.replaced == ["r1-reward", "r1-policy", "r1-evaluation"] and not (tmp_path / "two").exists()


def test_of_several_processes_all_check_and_one_prints(config, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("WARNING")  # which the command raises where it does not lead; it is set back
    (tmp_path / "recipe.yaml").write_text(to_yaml(config()))
    checked = []
    monkeypatch.setattr(run_module, "check", checked.append)
    monkeypatch.setattr(run_module, "forecast", lambda config, until: "said")
    for leads in (False, True):
        monkeypatch.setattr("jaxrlhf.distributed.is_leader", lambda leads=leads: leads)
        assert cli.main(["run", str(tmp_path / "recipe.yaml"), "--dry_run"]) == 0
        assert capsys.readouterr().out == "said\n" * leads
    assert checked == [config(), config()]


def test_dry_run_builds_and_writes_nothing(config, recorded, tmp_path, capsys):
    text = forecast(config())
    assert "7 stages, 0 finished, 7 to build" in text and "  build  r1-policy  " in text and not (tmp_path / "runs").exists()
    later = forecast(config(rounds=2, method="ocrm", refit={"when": "ess"}))
    assert later.endswith("unknown yet: r2-refit decides what follows")
    folder = run(config())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((folder / "config.yaml").read_text())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert cli.main(["run", str(recipe), "--dry_run", "--reward.learning-rate", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "changed: reward.learning_rate 0.001 → 0.5" in said and "7 stages, 4 finished, 3 to build" in said
    assert "  kept   sft  " in said and "  build  r1-policy  " in said
    assert cli.main(["sft", str(recipe), "--dry-run"]) == 0 and "2 stages, 2 finished, 0 to build" in capsys.readouterr().out
    assert cli.main(["run", str(recipe), "--reward.learning-rate", "0.5"]) == 1 and "--replace" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before and recorded.built == STAGES
    assert cli.main(["reward", str(recipe), "--reward.learning-rate", "0.5", "--replace"]) == 0
    assert recorded.built[len(STAGES) :] == ["r1-reward"]


def test_arms_and_sweeps_are_asked_for_all_at_once(config, recorded, tmp_path):
    arms = {"arms": {"a": {}, "b": {"ppo.kl_coef": 0.5}}}
    swept = config(name="swept", **arms)
    sweep(swept, (0,))
    assert all(read_finished(job) for job in jobs_of(swept, (0,)))
    other = config(name="swept", reward__learning_rate=0.5, **arms)
    with pytest.raises(ConfigError) as error:
        sweep(other, (0, 1))
    assert str(error.value).count("has results of another recipe") == 2 and str(error.value).count("--replace") == 1
    assert not (tmp_path / "runs" / "swept" / "seed-1").exists()
    sweep(other, (0,), replace=True)
    assert all(read_finished(job) for job in jobs_of(other, (0,))) and not any(read_finished(job) for job in jobs_of(swept, (0,)))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_of_another_origin_is_never_written_over(config, tmp_path, name):
    theirs = tmp_path / "runs" / "tiny" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("name: mine # my notes\n")
    with pytest.raises(ConfigError, match=rf"{name} was not written by jaxrlhf.*--name"):
        check_ours(config())
    if name == "config.yaml":
        for refused in (lambda: run(config(), replace=True), lambda: sweep(config(), (0,)), lambda: run(config(arms={"a": {}}))):
            with pytest.raises(ConfigError, match=rf"{name} was not written by jaxrlhf.*--name"):
                refused()
        assert theirs.read_text() == "name: mine # my notes\n" and [path.name for path in theirs.parent.iterdir()] == [name]
    theirs.rename(theirs.with_name("log.txt"))  # which no run writes
    check_ours(config())


def test_the_recipe_that_is_read_is_not_written_over(config, recorded, tmp_path, monkeypatch, capsys):
    """`jaxrlhf sft exp1/config.yaml --output . --name exp1` in the folder above it."""
    mine = tmp_path / "exp1" / "config.yaml"
    mine.parent.mkdir()
    mine.write_text("# mine\npairs: {source: sample}\ngold: {kind: toy}\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sft", "exp1/config.yaml", "--output", ".", "--name", "exp1"]) == 1
    assert "exp1/config.yaml was not written by jaxrlhf" in capsys.readouterr().err and mine.read_text().startswith("# mine")


def test_a_recipe_that_was_made_from_that_of_a_run_is_not_written_over(config, recorded, tmp_path, monkeypatch, capsys):
    """Copied with its mark into a folder of its own; and changed by hand where it is."""
    text = (run(config()) / "config.yaml").read_text()
    theirs = tmp_path / "exp1" / "config.yaml"
    theirs.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    here = ["exp1/config.yaml", "--output", ".", "--name", "exp1"]
    for changed in (text.replace("\nrounds:", "\n# more\nrounds:"), text.replace("kl_coef: 0.05", "kl_coef: 0.5")):
        theirs.write_text(changed)
        for command in (["run", *here], ["sft", *here, "--dry_run"], ["run", *here, "--replace"], ["sweep", *here, "--seeds", "1"]):
            assert cli.main(command) == 1
            assert "exp1/config.yaml was not written by jaxrlhf as it stands" in capsys.readouterr().err and theirs.read_text() == changed
    theirs.write_text("# mine\n" + text)
    with pytest.raises(ConfigError, match="was not written by jaxrlhf"):  # read or not
        check_ours(config(output=str(tmp_path), name="exp1"))
    short = tmp_path / "runs" / "config.yaml"  # in a folder with runs: nobody's but theirs
    short.write_text("pairs:\n  source: sample\ngold:\n  kind: toy\n")
    for arguments in ((), ("--rounds", "2")):
        assert cli.main(["run", "runs/config.yaml", "--output", ".", "--name", "runs", *arguments]) == 1
    own = ["sft", "runs/tiny/config.yaml"]
    assert cli.main(own) == cli.main([*own, "--log.every", "7"]) == 0  # its run wrote it
    (tmp_path / "runs" / "tiny" / "config.yaml").write_text(f"{text}# the best so far\n")
    assert cli.main(own) == 1 and run(config(), until="sft")
    for read in (run, lambda path: sweep(path, (0,))):
        with pytest.raises(ConfigError, match="as it stands"):
            read(tmp_path / "runs" / "tiny" / "config.yaml")
