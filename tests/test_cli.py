"""The command line: exit status, one clear message, and nothing compiled or written before a recipe is known to be sound."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml

from jaxrlhf import cli
from jaxrlhf.algorithms.rounds import METHODS
from jaxrlhf.commands.recipe_arguments import config_of
from jaxrlhf.config import Config

TOY = {"pairs": {"source": "sample"}, "gold": {"kind": "toy"}}


@pytest.fixture
def recipe(tmp_path):
    def write(**changes) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(TOY | {"output": str(tmp_path / "runs")} | changes))
        return str(path)

    return write


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What would have been run: (config, until)."""
    made = []
    import jaxrlhf.pipeline.run as module

    def run(config, *, until=None, replace=False):
        made.append((config, until))
        folder = tmp_path / "made"
        folder.mkdir(exist_ok=True)
        row = dict.fromkeys(("gold", "proxy_start", "proxy", "kl_sft", "ess", "reward_accuracy", "win_rate")) | {"round": 0}
        (folder / "summary.json").write_text(json.dumps({"method": "ppo", "seed": 0, "rounds": [row]}))
        return folder

    monkeypatch.setattr(module, "run", run)
    return made


def test_a_flag_of_jax_that_jax_does_not_know_is_one_line(recipe):
    """jax itself raises, where it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxrlhf.cli", "run", recipe()],
        env=os.environ | {"JAX_DEFAULT_PRNG_IMPL": "foo"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, 'jaxrlhf: Invalid value "foo" for JAX flag jax_default_prng_impl\n')


def test_without_arguments_and_help(capsys):
    assert cli.main([]) == 2
    for argv in (["--help"], ["run", "--help"], ["sft", "-h"]):
        assert cli.main(argv) == 0
    assert "jaxrlhf run CONFIG.yaml" in capsys.readouterr().out
    assert cli.main(["run"]) == 2 and cli.main(["run", "--seed", "1"]) == 2
    assert "needs a config" in capsys.readouterr().err
    assert cli.main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo": {"kl_coeff": 1}}, "unknown key 'ppo.kl_coeff'; did you mean 'ppo.kl_coef'?"),
        ({"method": "ocmr"}, f"method 'ocmr' is unknown; the table has {', '.join(METHODS)}. Did you mean 'ocrm'?"),
        ({"arms": {"a": {"method": "pppo"}}}, "method 'pppo' is unknown"),
        ({"reward": {"loss": "bradley-terry"}}, "reward.loss 'bradley-terry' is unknown"),
        ({"reward": {"loss": "no_such_module:loss"}}, "no module 'no_such_module'"),
        ({"ppo": {"loss": "grpo"}}, "ppo.loss 'grpo' is unknown"),
        ({"rounds": "x"}, "rounds is 'x'"),
        ({"ppo": {"missing_eos_penalty": 1, "missing_eos_score": 1}}, "set at most one of them"),
        ({"sft": {"batch_size": 30}}, "sft.batch_size 30 does not divide over 4 data shards; try 28."),
        ({"gold": {"kind": "none"}, "pairs": {"source": "data"}, "data": {"train": "/no/such/pairs.jsonl"}}, "/no/such/pairs.jsonl"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_run_is_refused_before_anything_is_built(recipe, tmp_path, capsys, changes, message):
    assert cli.main(["run", recipe(**changes)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("jaxrlhf: ") and "Traceback" not in error
    assert not list(tmp_path.glob("runs/**/stage.json")) and not (tmp_path / "runs" / ".stages").exists()


def test_a_file_that_is_not_there(capsys):
    assert cli.main(["run", "quickstrat.yaml"]) == 1
    assert "Did you mean quickstart.yaml?" in capsys.readouterr().err


def test_overrides_are_parsed_into_the_config(recipe, calls, capsys):
    argv = [
        "run",
        recipe(),
        "--seed",
        "7",
        "--ppo.kl_coef",
        "0.5",
        "--ppo.missing-eos-score",
        "-1",
        "--weights.eta",
        "ess",
        "--standalone",
        "True",
    ]
    assert cli.main(argv) == 0
    config, until = calls[0]
    assert isinstance(config, Config) and until is None
    assert (config.seed, config.ppo.kl_coef, config.ppo.missing_eos_score, config.weights.eta, config.standalone) == (
        7,
        0.5,
        -1.0,
        "ess",
        True,
    )
    assert config.gold.kind == "toy"  # the file's own values stay
    assert "run folder:" in capsys.readouterr().out


def test_overrides_keep_arms(recipe, calls):
    assert cli.main(["run", recipe(arms={"a": {"ppo.kl_coef": 0.1}, "b": {}}), "--rounds", "2"]) == 0
    assert calls[0][0].rounds == 2 and calls[0][0].arms == {"a": {"ppo.kl_coef": 0.1}, "b": {}}


@pytest.mark.parametrize("words", [["--method", "ppo"], ["--method=ppo"], ["--ppo.kl-coef", "0.2"], ["--weights.eta", "ess"]])
def test_an_override_that_an_arm_overrules_is_refused(recipe, calls, capsys, words):
    path = recipe(arms={"a": {"method": "ocrm", "weights": {"eta": 0.1}}, "b": {"ppo.kl_coef": 0.1, "method": "retrain"}})
    assert cli.main(["run", path, "--rounds", "2", *words]) == 1
    key = words[0][2:].partition("=")[0].replace("-", "_")
    whose = {"method": "arms a, b set", "ppo.kl_coef": "arm b sets", "weights.eta": "arm a sets"}[key]
    assert f"--{key} would do nothing: {whose} {key} already" in capsys.readouterr().err and not calls
    assert cli.main(["run", path, "--ppo.kl_coef_previous", "0.2"]) == 0  # a key that only begins like an arm's


def test_wrong_overrides(recipe, calls, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", recipe(), "--ppo.kl_coeff", "1"])
    assert stop.value.code == 2 and "kl" in capsys.readouterr().err
    assert cli.main(["run", recipe(), "--weights.alpha", "2"]) == 1
    assert "weights.alpha is 2.0" in capsys.readouterr().err and not calls


@pytest.mark.parametrize("command", ["sft", "reward", "ppo"])
def test_single_stage_commands(recipe, calls, command):
    assert cli.main([command, recipe()]) == 0
    assert calls[0][1] == command


def test_faults_of_ours_keep_their_traceback(recipe, monkeypatch):
    import jaxrlhf.pipeline.run as module

    def broken(config, *, until=None, replace=False):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(module, "run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", recipe()])

    def stopped(config, *, until=None, replace=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run", stopped)
    assert cli.main(["run", recipe()]) == 130


def test_only_messages_written_for_users_are_shown_without_a_traceback(recipe, monkeypatch, tmp_path, capsys):
    """Our `raise` statements, the system and missing modules speak for themselves; a failing operation, ours or a plug-in's, does not."""
    import jaxrlhf.pipeline.run as module
    from jaxrlhf.data.read_report import ReadReport
    from jaxrlhf.data.tokens import Limits, pad_right
    from jaxrlhf.losses.bradley_terry import column
    from jaxrlhf.sharding import check_batch_size
    from jaxrlhf.types import PairBatch

    def outcome(fault):
        monkeypatch.setattr(module, "run", lambda config, **given: fault())
        return cli.main(["run", recipe()])

    def own():
        raise ValueError("from code that is not the package's")

    batch = PairBatch(*[None] * 9, {})
    for fault, message in (
        (lambda: Limits(0, 1), "max_prompt_length is 0"),  # an error type of ours
        (lambda: check_batch_size(30, 4, name="b"), "does not divide"),  # a ValueError of ours
        (jax.jit(lambda: pad_right([[1, 2]], 1, 0)), "row 0 has 2 tokens"),  # the same, raised while jax traces
        (lambda: column(batch, "margin"), "the loss reads column 'margin', the batch has none"),  # a KeyError: its text, unquoted
        (lambda: (tmp_path / "gone").read_text(), "No such file"),
        (lambda: importlib.import_module("no_such_package"), "No module named 'no_such_package'"),
    ):
        assert outcome(fault) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("jaxrlhf: ") and "Traceback" not in error and len(error.splitlines()) == 1
    for fault, kind in (
        (own, ValueError),
        (lambda: int("x"), ValueError),
        (lambda: pad_right([["x"]], 1, 0), ValueError),  # numpy's complaint inside our function
        (lambda: ReadReport().summary(limit="x"), TypeError),
        (lambda: importlib.import_module("jaxrlhf.no_such_module"), ImportError),
    ):
        with pytest.raises(kind):
            outcome(fault)


def test_generate_prints_rows_and_writes_files_whole(monkeypatch, tmp_path, capsys):
    import jaxrlhf.rollouts.texts as module

    seen = []
    monkeypatch.setattr(module, "generate_texts", lambda **settings: seen.append(settings) or iter([{"id": "0", "response": "é"}]))
    assert cli.main(["generate", "folder", "a prompt", "--temperature", "0", "--num_samples", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == {"id": "0", "response": "é"}
    assert (
        seen[0]["prompts"] == ["a prompt"] and seen[0]["temperature"] == 0 and seen[0]["num_samples"] == 2 and seen[0]["folder"] == "folder"
    )
    target = tmp_path / "out.jsonl"
    assert cli.main(["generate", "folder", "--file", "prompts.jsonl", "--output", str(target)]) == 0
    assert target.read_text() == '{"id": "0", "response": "é"}\n' and [p.name for p in Path(tmp_path).iterdir()] == ["out.jsonl"]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Where a report is written to, empty."""
    target = tmp_path / "report.html"
    monkeypatch.setattr("jaxrlhf.commands.report.write_report", lambda folder: target.write_text("") or target)
    return target


def test_a_run_is_complete_before_it_is_shown(recipe, calls, page, monkeypatch, capsys):
    """Nobody reads standard output, or its disk is full: the report is written all the same, and the status says it."""
    read, write = os.pipe()
    os.close(read)
    for target, status, said in ((write, 141, ""), ("/dev/full", 1, "jaxrlhf: standard output could not be written ([Errno 28]")):
        with open(target, "w") as out:
            monkeypatch.setattr(sys, "stdout", out)
            assert cli.main(["run", recipe()]) == status
        error = capsys.readouterr().err
        assert page.exists() and error.startswith(said) and len(error.splitlines()) == (status == 1)
        page.unlink()


def test_a_terminal_without_our_characters_ends_no_run(recipe, calls, page, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["run", recipe(name="é")]) == 0
    out.flush()
    assert b"report: " in out.buffer.getvalue() and page.exists()


def test_generated_lines_stay_json_in_any_terminal(monkeypatch):
    import jaxrlhf.rollouts.texts as module

    monkeypatch.setattr(module, "generate_texts", lambda **settings: iter([{"response": "é日"}]))
    for encoding, written in (("ascii", rb"\u00e9\u65e5"), ("utf-8", "é日".encode())):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(["generate", "folder", "a prompt"]) == 0
        assert out.buffer.getvalue() == b'{"response": "%s"}\n' % written


@pytest.fixture
def swept(monkeypatch, tmp_path):
    """What would have been swept: (config, seeds); the sweep's one run finished, or failed where `failed` is appended to."""
    import jaxrlhf.sweep.sweep as module
    from jaxrlhf.sweep.statistics import Run, Sweep

    made, failed = [], []
    settings = {"policy_update": "ppo", "reference": "SFT", "reward": "kept", "restart": "–", "rounds": 1, "episodes": 8, "prompts": 8}

    def sweep(config, seeds, *, replace=False):
        made.append((config, seeds))
        run = Run(0, "a", "failed", error="ValueError: no", folder="f") if failed else Run(0, "a", "pending")
        module.write_table(Sweep("s", None, {"a": settings | {"response_length": 1}}, (run,)), tmp_path)
        return tmp_path

    monkeypatch.setattr(module, "sweep", sweep)
    monkeypatch.setattr("jaxrlhf.commands.report.write_report", lambda folder: folder / "report.html")
    return made, failed


def test_sweep_parses_its_seeds_and_overrides(recipe, swept, capsys):
    made, failed = swept
    assert cli.main(["sweep", recipe(arms={"a": {}}), "--seeds", "2", "--rounds", "2", "--sft_seed", "0"]) == 0
    (config, seeds), output = made[0], capsys.readouterr().out
    assert seeds == (0, 1) and config.rounds == 2 and config.sft_seed == 0 and config.arms == {"a": {}}
    assert "sweep folder:" in output and "reward model" in output
    assert re.search(r"^report: .*report\.html$", output, re.MULTILINE), output  # the page is written, not only offered
    failed.append(True)
    assert cli.main(["sweep", recipe(), "--seeds=3,5"]) == 1
    assert made[1][1] == (3, 5) and "runs that failed: 1 of 1" in capsys.readouterr().err


def test_sweep_refuses_what_cannot_be_meant(recipe, swept, capsys):
    for words, message in (
        ([], "a sweep needs its seeds"),
        (["--seeds", "x"], "--seeds 'x' is neither"),
        (["--seeds", "2", "--seed", "1"], "--seed would do nothing"),
        (["--seeds", "2", "--weights.alpha", "2"], "weights.alpha is 2.0"),
    ):
        assert cli.main(["sweep", recipe(), *words]) == 1
        assert message in capsys.readouterr().err and not swept[0]
    assert cli.main(["sweep"]) == 2 and cli.main(["sweep", "--seeds", "2"]) == 2 and cli.main(["sweep", "--help"]) == 0


@pytest.mark.parametrize("command", ["embed", "nearest"])
def test_tools_have_their_own_options(command, monkeypatch, capsys):
    module = importlib.import_module(f"jaxrlhf.commands.{command}")
    seen = []
    monkeypatch.setattr(module, "main", lambda options: seen.append(options) or 3)
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and f"jaxrlhf {command}" in capsys.readouterr().out and not seen
    given = {"embed": ["pairs.jsonl"], "nearest": ["pairs.jsonl", "--embeddings", "v", "--generations", "g.jsonl"]}[command]
    assert cli.main([command, *given, "--output", "there"]) == 3
    assert seen[0].output == "there"


def test_columns_of_the_row_are_given_on_the_command_line_too(recipe, capsys):
    """Whether or not the recipe has a row; a column that does not exist is refused by name."""
    config = config_of("run", recipe(), ["--row.reference", "previous", "--seed", "3", "--row.restart-critic=false"])
    assert config.row == {"reference": "previous", "restart_critic": False} and config.seed == 3
    assert cli.main(["run", recipe(), "--row.refernce", "sft"]) == 1
    assert "row.refernce is no column of a method; the columns are policy_update" in capsys.readouterr().err


def test_an_ensemble_without_reward_model_is_refused(recipe, capsys):
    assert cli.main(["run", recipe(method="dpo", row={"ensemble": "mean"})]) == 1
    assert "row.ensemble is 'mean', but dpo uses no reward model" in capsys.readouterr().err


def test_help_of_the_sweep(capsys):
    assert cli.main(["sweep", "--help"]) == 0
    assert "--seeds" in capsys.readouterr().out
