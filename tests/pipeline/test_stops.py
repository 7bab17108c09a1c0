"""What a stop costs: checkpoints by time, signals that save before they end, and passes that go on behind their finished blocks."""

import os
import re
import shutil
import signal
import time
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

import jaxrlhf
from jaxrlhf import cli
from jaxrlhf.commands import verify_resume
from jaxrlhf.config import CheckpointConfig
from jaxrlhf.config.checks import contradictions
from jaxrlhf.distributed import stops
from jaxrlhf.distributed.launch import passed_on
from jaxrlhf.distributed.stops import Look, Looks, Stopped, heard
from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.offline.nearest import nearest_similarity
from jaxrlhf.pipeline.run import run
from jaxrlhf.pipeline.stages import sft
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.recipe import ConfigError, from_mapping
from jaxrlhf.rollouts import dataset
from jaxrlhf.scorers.function import checked
from jaxrlhf.storage.blocks import NOWHERE, Blocks
from jaxrlhf.storage.checkpoint import Checkpoints
from jaxrlhf.types import Completion, PromptBatch

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that are added to the clock: `clock[0] += 60` is a minute."""
    added, monotonic = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + added[0])
    return added


def test_a_default_round_has_checkpoints_by_time(clock):
    """195 updates of a minute and a half: one every seven, and the last."""
    default, saved = CheckpointConfig(), []
    with Looks(default.minutes, default.every, 195) as looks:
        for n in range(1, 196):
            clock[0] += 90
            if looks.at(n).save:
                saved.append(n)
                looks.saved()
    assert saved == [*range(7, 195, 7), 195]
    with Looks(None, 50, 195) as looks:
        assert [n for n in range(1, 196) if looks.at(n).save] == [50, 100, 150, 195]


def test_sigterm_saves_at_the_next_step_and_the_same_command_goes_on(tmp_path, tiny_mapping, monkeypatch, capfd):
    """A real signal, in the middle of SFT's second step. The state is on disk, the command is named, and it goes on to the same bits."""
    raw, train, save = tiny_mapping(tmp_path / "stopped"), sft.train, Checkpoints.save
    config, saved = tmp_path / "config.yaml", []
    config.write_text(yaml.safe_dump(raw))

    def told(*given):
        for n, one in enumerate(train(*given), start=1):
            if n == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield one

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(sft, "train", told)
        patch.setattr(Checkpoints, "save", lambda self, step, *rest: saved.append(step) or save(self, step, *rest))
        assert cli.main(["sft", str(config), "--log.every", "1"]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before and saved == [2]
    said = capfd.readouterr().err
    assert "sft is saved at step 2 of 3. The same command goes on from there:" in said
    assert said.splitlines()[-1] == f"  jaxrlhf sft {config} --log.every 1"
    assert cli.main(["sft", str(config)]) == 0
    assert "goes on from step 2 of 3" in capfd.readouterr().err
    folder = tmp_path / "stopped" / "tiny"
    assert [line["step"] for line in read(folder / "metrics.jsonl")] == [1, 2, 3]
    whole = tmp_path / "config-whole.yaml"
    whole.write_text(yaml.safe_dump(raw | {"output": str(tmp_path / "whole")}))
    assert cli.main(["sft", str(whole)]) == 0
    a, b = (jax.tree.leaves(jaxrlhf.load(place / "stages" / "01-sft").params) for place in (folder, tmp_path / "whole" / "tiny"))
    assert all((x == y).all() for x, y in zip(a, b, strict=True))


def test_a_signal_outside_of_a_loop_and_a_second_one_stop_at_once(clock, capfd):
    with heard():
        with pytest.raises(Stopped) as outside:
            os.kill(os.getpid(), signal.SIGINT)
        assert (outside.value.code, outside.value.where) == (130, None)
    with pytest.raises(Stopped), heard(), Looks() as looks:
        assert looks.at(1) == Look(False, None)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the same request, by another way
        assert looks.at(2) == Look(True, signal.SIGTERM)
        clock[0] += 5
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("a second signal did not stop at once")
    assert "once more stops at once" in capfd.readouterr().err
    with heard():
        pass  # what came before is forgotten
    with Looks() as looks:
        assert looks.at(1).stop is None


def test_of_several_processes_the_leader_decides_at_steps_that_all_know(clock, monkeypatch):
    """Steps of a tenth of a second: it looks about once a second. Process 1 is told, and both stop at the same step."""
    keys: dict[str, str] = {}

    class Client:
        def key_value_set(self, key, value, allow_overwrite=False):
            keys[key] = value

        def key_value_dir_get(self, folder):
            return [(key, value) for key, value in keys.items() if key.startswith(folder)]

    decisions, me, agreed = [], [0], []
    monkeypatch.setattr(stops, "count", lambda: 2)
    monkeypatch.setattr(stops, "index", lambda: me[0])
    monkeypatch.setattr(stops, "is_leader", lambda: me[0] == 0)
    monkeypatch.setattr(stops, "barrier", lambda name: None)
    monkeypatch.setattr(stops, "coordinator_client", Client)

    def agree(value, what):
        if me[0] == 0:
            agreed.append(value)
            return value
        return agreed[len(decisions)]

    monkeypatch.setattr(stops, "agree", agree)
    leader, other = Looks(minutes=1), Looks(minutes=1)
    monkeypatch.setattr(stops, "_asked", [])
    stopped = {}
    for n in range(1, 200):
        clock[0] += 0.1
        if n == 100:
            Client().key_value_set("jaxrlhf/stop/1", "15")
        me[0] = 0
        first = leader.at(n)
        me[0] = 1
        looked = len(agreed) > len(decisions)
        second = other.at(n)
        decisions += [n] if looked else []
        assert first == second
        if first.stop is not None:
            stopped = {"step": n, "looks": len(decisions)}
            break
    stops._holding.clear()
    assert 100 <= stopped["step"] <= 110 and stopped["looks"] < 25


def counted(calls, rows=1):
    def compute(start):
        for n in range(start, 10):
            calls.append(n)
            yield np.full((rows, 2), n, np.int32), np.arange(n, n + rows) % 2 == 0

    return compute


def test_blocks_that_are_finished_are_not_computed_again(tmp_path, clock, monkeypatch):
    whole, calls = NOWHERE.collect(10, counted([])), []
    place, ask = Blocks(tmp_path).of("a pass, 1 of 2", np.arange(3), ["text"]), counted(calls)

    def killed(start):
        for one in ask(start):
            clock[0] += 25  # three batches are a block
            yield one
            if calls[-1] == 7:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        place.collect(10, killed)
    assert sorted(path.name for path in place.folder.iterdir()) == ["00000000-00000003.npz", "00000003-00000006.npz"]
    heard_of = []
    again = place.collect(10, ask, progress=lambda done, total: heard_of.append(done))
    assert calls == [*range(8), *range(6, 10)] and heard_of == [0, 3, 6, 7, 8, 9, 10]
    for a, b in zip(whole, again, strict=True):
        assert a.dtype == b.dtype and (a == b).all()
    # A damaged block, and that block alone, is computed again.
    block = place.folder / "00000003-00000006.npz"
    for damage in (b"", block.read_bytes()[:-1], bytes([block.read_bytes()[0] ^ 1]) + block.read_bytes()[1:], b"\0" * 300):
        block.write_bytes(damage)
        calls.clear()
        assert (place.collect(10, ask)[0] == whole[0]).all() and calls == [3, 4, 5]
    # Another pass, or the same one over other rows, shares nothing with it.
    others = [Blocks(tmp_path).of("another pass", np.arange(3), ["text"]), Blocks(tmp_path).of("a pass, 1 of 2", np.arange(4), ["text"])]
    assert len({other.folder for other in (*others, place)}) == 3
    place.remove()
    assert not place.folder.exists()


def test_passes_over_tables_end_behind_the_batch_in_work_and_go_on(tmp_path, monkeypatch):
    """Sampling, nearest vectors and a gold of the user's: told to stop in the middle, they compute nothing twice, and to the same bits."""
    calls = []

    def generate(model, params, prompt_BL, mask_BL, key, *, index_B, **how):
        calls.append(np.asarray(index_B).tolist())
        return Completion(10 * np.asarray(index_B)[:, None] + np.arange(3), np.ones((len(index_B), 3), bool), np.zeros((len(index_B), 3)))  # type: ignore[arg-type]

    monkeypatch.setattr(dataset, "generate", generate)
    ones = np.ones((7, 2), bool)
    prompts = PromptBatch(ones.astype(np.int32), ones, np.ones(7, bool), np.arange(7, dtype=np.int32))  # type: ignore[arg-type]
    vectors = np.eye(8, dtype=np.float32)[np.arange(101) % 8]
    gold = checked(lambda asked, said: calls.append(len(said)) or [float(len(text)) for text in said], "gold")
    texts = [str(n) * (n % 7) for n in range(600)]

    def sampled(**how):
        return dataset.sample_dataset(None, {}, prompts, None, dataset.Sampling(3, (1,)), batch_size=2, **how).response_BT  # type: ignore[arg-type]

    passes = (
        (sampled, 4),
        (lambda **how: nearest_similarity(vectors, vectors[:9], block=20, **how), 6),
        (lambda blocks=NOWHERE, progress=None: gold(texts, texts, blocks), 3),
    )
    for number, (work, total) in enumerate(passes):
        whole, told, heard_of = work(), [], []
        place = Blocks(tmp_path).of(str(number))

        def tell(done, of, told=told):
            told.append(done)
            if done == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        if total == 3:  # a function hears of no progress
            inner = Blocks.collect
            monkeypatch.setattr(Blocks, "collect", partialmethod(inner, progress=tell))
        calls.clear()
        with pytest.raises(Stopped) as stopped, heard():
            work(blocks=place, progress=tell)
        assert stopped.value.where == f"batch 2 of {total} of a pass is stored" and told == [0, 1, 2]
        first = len(calls)
        again = work(blocks=place, progress=lambda done, of, heard_of=heard_of: heard_of.append(done))
        if total != 3:
            assert heard_of == [0, *range(2, total + 1)]
        assert (np.asarray(again) == np.asarray(whole)).all() and np.asarray(again).dtype == np.asarray(whole).dtype
        if total != 6:
            assert first == 2 and len(calls) == total


def test_a_signal_whose_handler_is_not_pythons_is_left_alone(monkeypatch):
    """getsignal is None there, which signal does not take back."""
    before, known = {number: signal.getsignal(number) for number in stops.SIGNALS}, signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else known(number))
    for hears in (heard, lambda: passed_on([])):
        with hears():
            assert known(signal.SIGTERM) == before[signal.SIGTERM] and known(signal.SIGINT) != before[signal.SIGINT]
        assert {number: known(number) for number in before} == before


def attempts(tmp_path, monkeypatch, statuses, *, noted):
    """The exit status of verify-resume whose attempts end with these; every killed one leaves a note where it is `noted`."""
    left = list(statuses)

    def launch(command, processes, devices):
        part, status = Path(command[command.index("--part") + 1]), left.pop(0)
        if status == 137 and noted:
            (part / f".{len(left)}.killed").touch()
        print("its last words")
        return status

    monkeypatch.setattr(verify_resume, "launch", launch)
    monkeypatch.setattr(verify_resume, "verdicts", lambda *_: [(True, "equal")])
    path = tmp_path / "tiny.yaml"
    return cli.main(["verify-resume", str(path)]), left


def test_verify_resume_ends_where_something_else_kills_it_and_where_it_is_stopped(tmp_path, tiny_mapping, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_mapping(tmp_path)))
    assert attempts(tmp_path, monkeypatch, (0, 137, 137, 0), noted=True) == (0, [])
    assert attempts(tmp_path, monkeypatch, (0, 137, 0), noted=False) == (1, [0])  # else it would be started again for ever
    assert "exit status 137" in (said := capsys.readouterr().err) and "its last words" in said
    for statuses in ((130, 0), (0, 143, 0)):
        assert attempts(tmp_path, monkeypatch, statuses, noted=True) == (statuses[-2], [0])
        assert "stopped. Nothing is kept" in capsys.readouterr().err


def test_verify_resume_started_once_a_task_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(cli, "check_alone", lambda command: refuse(command))

    def refuse(command):
        raise ConfigError(f"{command} is one process")

    assert cli.main(["verify-resume", "x.yaml"]) == 1 and "verify-resume is one process" in capsys.readouterr().err
    monkeypatch.setattr(verify_resume, "main", lambda options: 7)
    assert cli.main(["verify-resume", "x.yaml", "--part", "there"]) == 7  # what it starts


def test_verify_resume_tells_a_training_that_goes_on_from_one_that_keeps_something_in_memory(tmp_path, tiny_mapping, monkeypatch):
    """SFT in one go against SFT that is killed half-way, here by an exception. What differs is named, with how far it is apart."""
    train = sft.train

    def killed(checkpoint, note):
        note.touch()
        raise InterruptedError

    def forgetful(step, state, batches):  # behaves like `train` in a process that has taken the first step
        lost = int(state.step) > 0
        for new, metrics in train(step, state, batches):
            yield replace(new, params=jax.tree.map(lambda x: x * (1 + 1 / 1024), new.params)) if lost else new, metrics

    monkeypatch.setattr(verify_resume, "die", killed)

    def verify(part, context):
        run(verify_resume.shortened(from_mapping(tiny_mapping(tmp_path / part)), 2), until="sft", context=context)

    killed_once = partial(verify_resume.Killed, notes=tmp_path / "halves")
    verify("whole", RunContext)
    for loop, expected in ((train, "equal"), (forgetful, r"DIFFERENT: \S+: largest difference [\d.e-]+")):
        monkeypatch.setattr(sft, "train", loop)
        with pytest.raises(InterruptedError):
            verify("halves", killed_once)
        verify("halves", killed_once)
        ((same, said),) = verify_resume.verdicts(tmp_path)
        assert same == (loop is train) and re.fullmatch(rf"tiny, sft: 2 steps, \d+ tensors, {expected}", said)
        shutil.rmtree(tmp_path / "halves")


def test_a_recipe_is_shortened_to_what_can_run(tiny_mapping, tmp_path):
    sizes = {"sft__warmup_steps": 50, "reward__max_steps": 0, "ppo__critic_warmup_updates": 2, "ppo__num_ppo_epochs": 4, "rounds": 3}
    sizes |= {"ppo__warmup_steps": 3}
    few = verify_resume.shortened(from_mapping(tiny_mapping(tmp_path, **sizes)), 2)
    assert not list(contradictions(few))
    assert (few.sft.max_steps, few.reward.max_steps, few.ppo.total_episodes // few.ppo.batch_size, few.rounds) == (2, 0, 2, 2)
    assert (few.checkpoint.every, few.ppo.batch_size, few.model) == (1, 16, from_mapping(tiny_mapping(tmp_path)).model)
