"""A run stopped before any of its file operations goes on to the same bits, and takes no step twice that a checkpoint had.

One run is watched: before every n-th operation that changes a file its folder is copied, as a kill at that moment leaves it (what other
threads do in the meantime included). Each copy is then put in the folder's place, and the run is started again.
"""

import copy
import itertools
import shutil
from collections import Counter

import pytest
from attack import content, copy_as_it_is, devices, differing, file_operations, run_quietly, steps_taken
from tiny_run import TINY

EVERY = 2  # steps between two checkpoints
STOPS, PARTS = 260, 10


def recipe(output) -> dict:
    """Two rounds of all that is kept: a refit by weights, critic and optimizer carried into the second round, held-out looks."""
    raw = copy.deepcopy(TINY) | {"output": str(output), "rounds": 2, "method": "ocrm", "checkpoint": {"every": EVERY}}
    raw["sft"] |= {"num_train_epochs": 2}
    raw["reward"] |= {"num_train_epochs": 2, "eval_steps": 2, "load_best_model_at_end": True}
    return raw


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(content of the store, number of file operations) of a run that nobody stops."""
    output = tmp_path_factory.mktemp("whole") / "runs"
    counted = Counter()

    def see(event, path):
        counted[event] += 1

    with devices(1), file_operations(output, see):
        run_quietly(recipe(output))
    return content(output / ".stages"), counted.total()


@pytest.mark.parametrize("part", range(PARTS))
def test_stopped_before_a_file_operation(tmp_path, whole, part):
    expected, operations = whole
    output, copies = tmp_path / "runs", tmp_path / "copies"
    stride = max(1, operations * PARTS // STOPS)  # of each part; the parts begin one after the other
    stops, numbers = [], itertools.count(1)

    def see(event, path):
        number = next(numbers)  # of any thread
        if number % stride == part * stride // PARTS:
            before = Counter(taken)
            copy_as_it_is(output, copies / str(number))
            stops.append((number, event, path, before))

    output.mkdir()
    with devices(1), steps_taken() as taken, file_operations(output, see):
        run_quietly(recipe(output))
    faults = []
    for number, event, path, before in stops:
        shutil.rmtree(output)
        (copies / str(number)).rename(output)
        said = f"stop {number}, before {event} {path}"
        try:
            with devices(1), steps_taken() as again:
                run_quietly(recipe(output))
        except Exception as error:
            faults.append(f"{said}: a dead end, {type(error).__name__}: {error} {getattr(error, '__notes__', '')}")
            continue
        if names := differing(content(output / ".stages"), expected):
            faults.append(f"{said}: other content of {names}")
        repeated = Counter((stage, round) for stage, round, _ in before.keys() & again.keys())
        # What the last interval took, and what was taken while the checkpoint before it was being written.
        faults += [f"{said}: {n} steps of {stage} were taken again" for stage, n in repeated.items() if n > 2 * EVERY]
        if left := leftovers(output):
            faults.append(f"{said}: {left} is still there")
    assert len(stops) >= STOPS // PARTS - 1
    assert not faults, "\n".join(faults)


def leftovers(output) -> list[str]:
    """What a finished run has no use for: partial files, half-written and half-removed folders."""
    hidden = [path for path in output.rglob(".*") if path.name not in (".stages", ".locks", ".blocks")]
    return [str(path.relative_to(output)) for path in [*hidden, *output.glob(".stages/.blocks/*")]]
