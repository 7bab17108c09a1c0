"""DPO, IPO and WPO as stages of a run: they start at the reference, read its log-probs from disk, and go on with the same bits."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf import sharding
from jaxrlhf.algorithms.ocrm import logps_read
from jaxrlhf.algorithms.reward_update import Pairs
from jaxrlhf.algorithms.rounds import METHODS, round_of
from jaxrlhf.data.columns import read_header
from jaxrlhf.data.tables import read_pair_table, write_pair_table
from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.offline import logprobs
from jaxrlhf.offline.logprobs import stored_pair_logps
from jaxrlhf.pipeline.run import run
from jaxrlhf.pipeline.stages import preference
from jaxrlhf.pipeline.stages.context import RoundInputs, RunContext
from jaxrlhf.pipeline.stages.pairs import TRAIN, UPDATED, WEIGHTS, pairs_stage
from jaxrlhf.pipeline.stages.preference import preference_stage, with_reference
from jaxrlhf.pipeline.stages.sft import sft_stage, tokenizer_stage
from jaxrlhf.steps.pair import pair_outputs
from jaxrlhf.storage.record import read_record
from jaxrlhf.storage.stage import Done, Stage
from jaxrlhf.storage.store import Store

pytestmark = pytest.mark.usefixtures("one_device")

DPO = {"batch_size": 16, "learning_rate": 2e-3, "num_train_epochs": 2, "beta": 0.5, "weight_decay": 0.0, "eval_batch_size": 32}
ARMS = {"dpo": {}, "wpo": {"method": "wpo"}, "ipo": {"dpo.loss": "ipo"}}
EVERY_DEVICE = sharding.make_mesh  # before the fixture that makes it one


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def computed(store, tiny_config):
    """(the finished run of all arms, how often log-probs of pairs were computed for it)."""
    calls, compute = [], logprobs.pair_logps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "pair_logps", lambda *given, **how: calls.append(1) or compute(*given, **how))
        folder = run(tiny_config(store, method="dpo", dpo=DPO, arms=ARMS))
    return folder, len(calls)


@pytest.fixture(scope="module")
def finished(computed) -> Path:
    return computed[0]


def stages(folder: Path) -> dict[str, Path]:
    return {link.name[3:]: link.resolve() for link in sorted((folder / "stages").iterdir())}


def params_of(folder: Path):
    return jax.tree.leaves(jaxrlhf.load(folder).params)


def same(a, b) -> bool:
    return all((x == y).all() for x, y in zip(a, b, strict=True))


def lines_of(folder: Path) -> list[dict]:
    return [line for line in read(folder / "metrics.jsonl") if line["stage"] == "policy"]


class Made:
    """A run's stages up to the pairs, in a store of its own choice, and preference policies on top of them."""

    def __init__(self, config, root: Path, mesh=None):
        mesh = mesh or sharding.make_mesh(-1, 1, 1)
        log = RunLog(root / "log", tensorboard=False)
        self.setting = RunContext(config, Store(root / ".stages"), root / "log", log, mesh)
        tokenizer = tokenizer_stage(self.setting)
        self.sft = sft_stage(self.setting, tokenizer)
        self.pairs = pairs_stage(self.setting, tokenizer, self.sft)

    def policy(self, row="dpo", *, number=1, start: Done | None = None, reference: Done | None = None, update: Done | None = None) -> Done:
        method = METHODS[row]
        round = round_of(method, number, None if number == 1 else round_of(method, 1))
        given = RoundInputs(self.sft, start or self.sft, reference or self.sft, self.sft, self.pairs, update=update)
        return preference_stage(self.setting, round, given)

    def update(self, weights, rows=None) -> Done:
        """What a reward update leaves: weights, and the pairs where it changed them."""

        def build(folder: Path):
            np.save(folder / WEIGHTS, np.asarray(weights, np.float32))
            if rows is not None:
                kept = Pairs(*read_pair_table(self.pairs.folder / TRAIN)).select(rows)
                write_pair_table(folder / UPDATED, kept.rows, kept.tokens, pad_id=0)

        given = {"weights": np.asarray(weights).tolist(), "rows": np.asarray(rows).tolist()}
        return self.setting.build(Stage("update", "data", "by-hand", given), build)


@pytest.fixture(scope="module")
def made(finished, store, tiny_config) -> Made:
    return Made(tiny_config(store, method="dpo", dpo=DPO), store)


def test_rows_run_end_to_end_without_a_reward_model(finished):
    """Two rounds are asked for; what would only be the first again is not trained."""
    for arm in ARMS:
        found = stages(finished / arm)
        assert list(found) == ["tokenizer", "sft", "pairs", "sft-evaluation", "r1-policy", "r1-evaluation"]
        record = read_record(found["r1-policy"])
        assert record["kind"] == "model" and record["function"] == ("wpo" if arm == "wpo" else "dpo")
        assert record["inputs"] == {"start": found["sft"].name, "reference": found["sft"].name, "pairs": found["pairs"].name}
        assert record["parent"] == found["sft"].name and not (found["r1-policy"] / "checkpoint").exists()
        assert record["result"]["steps"] == 2 * math.ceil(record["result"]["pairs"] / DPO["batch_size"])
        sft, last = json.loads((finished / arm / "summary.json").read_text())["rounds"]
        assert abs(last["kl_sft"]) > 1e-4 and last["gold"] != sft["gold"] and 0 <= last["win_rate"] <= 1
        assert last["proxy"] is None and last["reward_accuracy_valid"] is None
    policies = [params_of(stages(finished / arm)["r1-policy"]) for arm in ARMS]
    assert all(not same(a, b) for n, a in enumerate(policies) for b in policies[:n])


def test_training_starts_at_the_reference_and_learns_the_pairs(finished):
    beta = DPO["beta"]
    lines = {arm: lines_of(finished / arm) for arm in ARMS}
    first = {arm: of[0] for arm, of in lines.items()}
    assert first["dpo"]["loss/pair"] == pytest.approx(math.log(2), abs=2e-6)
    assert 0.1 < first["wpo"]["pair/wpo_weight"] <= 1
    assert first["wpo"]["loss/pair"] == pytest.approx(math.log(2) * first["wpo"]["pair/wpo_weight"], rel=1e-4)
    assert first["ipo"]["loss/pair"] == pytest.approx(1 / (4 * beta**2), rel=1e-4)
    for arm, of in lines.items():
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert abs(of[0][name]) < 1e-5, (arm, name)
        assert of[0]["pair/weight"] == 1 and of[0]["grad_norm"] > 0
        last = of[-1]
        assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-5)
        assert last["rewards/margins"] > 0.01 and last["rewards/accuracies"] > 0.5 and last["loss/pair"] < of[0]["loss/pair"]


def test_reference_columns_are_computed_once_for_all_arms_and_for_ocrm(computed, made, monkeypatch):
    _, calls = computed
    columns = list(made.setting.columns.glob("[!.]*"))
    assert calls == 1 and len(columns) == 1
    header = read_header(columns[0])["header"]
    assert header["model"] == made.sft.hash and header["temperature"] == 1.0 and header["max_tokens"] is None

    def never(*_, **__):
        raise AssertionError("the log-probs are on disk")

    monkeypatch.setattr(logprobs, "pair_logps", never)
    rows, tokens = read_pair_table(made.pairs.folder / TRAIN)
    sft = made.setting.load(made.sft, head="lm")

    def ours_of(config):
        given = {"model_hash": made.sft.hash, "tokenizer": sft.tokenizer, **logps_read(config)}
        return stored_pair_logps(made.setting.columns, rows, tokens, lambda: sft, **given)

    ours = ours_of(made.setting.config)
    table = with_reference(made.setting, 1, Pairs(rows, tokens), tokens, never, made.sft.hash, sft.tokenizer)
    for side in ("chosen", "rejected"):
        assert (table.columns[f"reference_{side}_logp"] == ours[f"{side}_logp"]).all() and len(rows) == len(ours[f"{side}_logp"])
    with pytest.raises(AssertionError, match="on disk"):  # another temperature is another column
        weights = replace(made.setting.config.weights, temperature=0.5)
        ours_of(replace(made.setting.config, weights=weights))


def test_log_probs_are_of_what_the_mask_covers(made):
    """Up to and including the first EOS, all tokens where there is none, nothing behind: in the columns and in the step alike."""
    rows, tokens = read_pair_table(made.pairs.folder / TRAIN)
    sft = made.setting.load(made.sft, head="lm")
    table = with_reference(made.setting, 1, Pairs(rows, tokens), tokens, lambda: sft, made.sft.hash, sft.tokenizer)
    eos, L = sft.tokenizer.eos_token_id, tokens.prompt_BL.shape[1]
    for side in ("chosen", "rejected"):
        response, mask = np.asarray(getattr(tokens, f"{side}_BT")), np.asarray(getattr(tokens, f"{side}_mask_BT"))
        lengths = mask.sum(axis=1)
        ends = response[np.arange(len(rows)), lengths - 1] == eos
        assert ends.any() and (ends | (lengths == mask.shape[1])).all()
        whole = np.concatenate([tokens.prompt_BL, response], axis=1)
        logits = np.asarray(sft.model.apply(sft.params, whole, np.concatenate([tokens.prompt_mask_BL, mask], axis=1)).logits, np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for b in range(0, len(rows), 5):
            by_hand = sum(logp[b, L + t - 1, response[b, t]] for t in range(lengths[b]))
            assert table.columns[f"reference_{side}_logp"][b] == pytest.approx(by_hand, rel=1e-4)
    kept = {f"{side}_BT": (getattr(tokens, f"{side}_mask_BT"), getattr(tokens, f"{side}_BT")) for side in ("chosen", "rejected")}
    rubbish = {name: np.where(mask, response, 7) for name, (mask, response) in kept.items()}
    scored = jax.jit(lambda batch: pair_outputs(sft.model, sft.params, batch, head="lm"))
    clean, dirty = scored(tokens), scored(replace(tokens, **rubbish))
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(getattr(clean, f"{side}_B"), table.columns[f"reference_{side}_logp"], rtol=1e-5)
        assert (np.asarray(getattr(dirty, f"{side}_B")) == np.asarray(getattr(clean, f"{side}_B"))).all()


def test_weights_and_selections_of_a_reward_update_reach_the_policy(made):
    plain = made.policy()
    n = plain.record["result"]["pairs"]
    ones, halves, none = (made.policy(update=made.update(np.full(n, weight))) for weight in (1.0, 0.5, 0.0))
    assert ones.hash != plain.hash and ones.record["inputs"]["update"]
    assert same(params_of(ones.folder), params_of(plain.folder))
    assert not same(params_of(halves.folder), params_of(plain.folder))
    assert same(params_of(none.folder), params_of(made.sft.folder))  # nothing counts, nothing decays: nothing moves
    every = made.policy(update=made.update(np.ones(n), rows=np.arange(n)))
    assert same(params_of(every.folder), params_of(plain.folder))
    fewer = made.policy(update=made.update(np.ones(n - 1), rows=np.arange(1, n)))
    assert fewer.record["result"]["pairs"] == n - 1 and not same(params_of(fewer.folder), params_of(plain.folder))
    with pytest.raises(ValueError, match=r"weights of shape \(3,\)"):
        made.policy(update=made.update(np.ones(3)))


def test_a_second_round_starts_from_its_start_against_its_reference(made):
    first = made.policy()
    lines = {}
    # The first of these computes the log-probs of a reference that is not where it starts.
    for name, start, reference in (("from-sft", made.sft, first), ("previous", first, first), ("sft", first, made.sft)):
        second = made.policy(number=2, start=start, reference=reference)
        assert second.record["inputs"]["reference"] == reference.hash and second.record["parent"] == start.hash
        lines[name] = [line for line in read(second.folder / "metrics.jsonl") if line["round"] == 2]
    assert lines["previous"][0]["loss/pair"] == pytest.approx(math.log(2), abs=2e-6)
    assert lines["sft"][0]["loss/pair"] < math.log(2) - 1e-3 and lines["sft"][0]["rewards/margins"] > 0.01
    assert lines["from-sft"][0]["rewards/margins"] == pytest.approx(-lines["sft"][0]["rewards/margins"], rel=0.01)


def test_a_stopped_training_goes_on_with_the_same_bits(finished, store, tiny_config, tmp_path, monkeypatch):
    """Stopped after its second step: neither the log-probs of the reference nor a step is computed twice."""
    done = stages(finished / "dpo")["r1-policy"]
    shutil.copytree(store / ".stages", tmp_path / ".stages", ignore=shutil.ignore_patterns(done.name, "columns", ".locks"))
    made = Made(tiny_config(tmp_path, method="dpo", dpo=DPO, checkpoint={"every": 1}), tmp_path)
    train, calls, compute, taken = preference.train, [], logprobs.pair_logps, []

    def interrupted(step, state, stream):
        for n, one in enumerate(train(step, state, stream), start=1):
            taken.append(1)
            yield one
            if n == 2 and len(taken) == 2:
                raise InterruptedError("stopped")

    monkeypatch.setattr(logprobs, "pair_logps", lambda *given, **how: calls.append(1) or compute(*given, **how))
    monkeypatch.setattr(preference, "train", interrupted)
    with pytest.raises(InterruptedError):
        made.policy()
    resumed = made.policy()
    assert resumed.hash == done.name and resumed.record["resumed"]
    assert len(taken) == resumed.record["result"]["steps"] and calls == [1]
    assert same(params_of(resumed.folder), params_of(done))

    def figures(folder: Path):
        return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read(folder / "metrics.jsonl")]

    assert figures(resumed.folder) == figures(done)


def test_on_a_mesh(made, store, tiny_config, tmp_path):
    """The columns are split over devices with their rows."""
    plain = made.policy("wpo")
    shutil.copytree(store / ".stages", tmp_path / ".stages", ignore=shutil.ignore_patterns(plain.hash, "columns", ".locks"))
    spread = Made(tiny_config(tmp_path, method="dpo", dpo=DPO), tmp_path, EVERY_DEVICE(4, 1, 1)).policy("wpo")
    assert spread.hash == plain.hash and not spread.cached
    for a, b in zip(params_of(spread.folder), params_of(plain.folder), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


def test_a_loss_of_the_users_without_a_reference(finished, made, store, tiny_config, tmp_path, monkeypatch):
    code = """
import jax
from jaxrlhf.losses import masked_mean
from jaxrlhf.types import PairLoss
def simpo(outputs, batch, *, total=None, beta=2.0):
    gap = outputs.chosen_B / batch.chosen_mask_BT.sum(-1) - outputs.rejected_B / batch.rejected_mask_BT.sum(-1)
    mean = lambda x: masked_mean(x, batch.row_mask_B, total=total)
    return mean(-jax.nn.log_sigmoid(beta * gap - 0.5)), {"gap": mean(gap)}
loss = PairLoss("lm", (), simpo)
"""
    (tmp_path / "users_pair_loss.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(preference, "with_reference", None)  # it is not asked for
    config = tiny_config(store, name="simpo", method="dpo", dpo={**DPO, "loss": "users_pair_loss:loss"})
    found = stages(run(config, until="ppo"))
    assert set(read_record(found["r1-policy"])["inputs"]) == {"start", "pairs"}
    line = lines_of(store / "simpo")[0]
    assert "pair/gap" in line and "rewards/margins" not in line
    assert not same(params_of(found["r1-policy"]), params_of(stages(finished / "dpo")["r1-policy"]))
    hashes = []
    monkeypatch.setattr(RunContext, "build", lambda self, stage, fn, *, round=None: hashes.append(stage.hash))
    for text in (code, code + "\n# changed\n"):
        (tmp_path / "users_pair_loss.py").write_text(text)
        sys.modules.pop("users_pair_loss")
        made.setting.config, kept = config, made.setting.config
        made.policy()
        made.setting.config = kept
    assert hashes[0] == found["r1-policy"].name != hashes[1]
    sys.modules.pop("users_pair_loss")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dpo__loss": "dop"}, r"dpo.loss 'dop' is unknown; use one of dpo, ipo"),
        ({"dpo__loss": "bradley_terry"}, r"dpo.loss 'bradley_terry' needs head 'scalar'"),
        ({"dpo__loss": "ipo", "dpo__label_smoothing": 0.1}, r"'ipo' has no hyperparameter 'label_smoothing'"),
        ({"dpo__label_smoothing": 0.5}, r"label_smoothing is 0.5; it must lie in \[0, 0.5\)"),
        ({"dpo__beta": 0}, r"dpo.beta is 0.* it must be above 0"),
        ({"dpo__wpo_clip": -1.0}, r"dpo.wpo_clip is -1.0; it must be above 0"),
    ],
)
def test_a_bad_config_is_refused_in_words(tiny_config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_config(tmp_path, method="dpo", **changes))
    assert not (tmp_path / ".stages").exists()
