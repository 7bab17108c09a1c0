"""The table of methods against one written out by hand, and what a round is where no refit is due."""

import dataclasses

import pytest

from jaxrlhf.algorithms.frft import nearest, nearest_importance_weighted, random_subset
from jaxrlhf.algorithms.ocrm import importance_weighted
from jaxrlhf.algorithms.reward_update import unweighted
from jaxrlhf.algorithms.rlp import synthetic
from jaxrlhf.algorithms.rounds import (
    METHODS,
    REWARD_UPDATES,
    SECTIONS_READ,
    Method,
    Round,
    method_of,
    num_rounds,
    reward_update_named,
    round_of,
)

FIRST = (None, True, "sft", 0, 0)
KEPT = [FIRST, (None, False, "sft", 0, 1), (None, False, "sft", 0, 2)]
KEPT_MOVED = [FIRST, (None, False, "sft", 1, 1), (None, False, "sft", 2, 2)]

# method: per round (reward update, fits a reward model, its start, KL reference, policy start); models by the round that made them.
BY_HAND = {
    "ppo": KEPT,
    "ppo-moving-reference": KEPT_MOVED,
    "ppo-ensemble": KEPT,
    "ppo-pessimistic": KEPT,
    "rloo": KEPT,
    "retrain": [FIRST, ("unweighted", True, "sft", 1, 1), ("unweighted", True, "sft", 2, 2)],
    "retrain-fixed-reference": [FIRST, ("unweighted", True, "sft", 0, 1), ("unweighted", True, "sft", 0, 2)],
    "frft": [FIRST, ("nearest", True, "sft", 0, 1), (None, False, "sft", 0, 2)],
    "frft-alpha": [FIRST, ("nearest", True, "sft", 0, 1), ("nearest", True, "sft", 0, 2)],
    "random-subset": [FIRST, ("random-subset", True, "sft", 0, 1), ("random-subset", True, "sft", 0, 2)],
    "random-subset-once": [FIRST, ("random-subset", True, "sft", 0, 1), (None, False, "sft", 0, 2)],
    "ocrm": [FIRST, ("importance-weighted", True, "sft", 1, 1), ("importance-weighted", True, "sft", 2, 2)],
    "ocrm-fixed-reference": [FIRST, ("importance-weighted", True, "sft", 0, 1), ("importance-weighted", True, "sft", 0, 2)],
    "frft+ocrm": [FIRST, ("nearest-importance-weighted", True, "sft", 1, 1), ("nearest-importance-weighted", True, "sft", 2, 2)],
    "rlp-spg": [FIRST, ("synthetic", True, "sft", 0, 0), ("synthetic", True, "sft", 0, 0)],
    "dpo": [(None, False, "sft", 0, 0)],
    "wpo": [(None, False, "sft", 0, 0)],
}
OTHER_POLICY_UPDATE = {"rloo": "rloo", "dpo": "dpo", "wpo": "wpo"}
ENSEMBLES = {"ppo-ensemble": "mean", "ppo-pessimistic": "mean-minus-spread"}


def rounds_of(method: Method, rounds: int, *, due=lambda number: True) -> list[Round]:
    """All rounds of a row, as a run goes through them; a refit is due where `due(number)` says so."""
    found: list[Round] = []
    for number in range(1, num_rounds(method, rounds) + 1):
        updated = any(r.reward_update is not None for r in found)
        found.append(round_of(method, number, found[-1] if found else None, due=due(number), updated=updated))
    return found


def test_every_row_is_written_out_here():
    assert BY_HAND.keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_rounds_by_hand(name):
    rounds = rounds_of(METHODS[name], 3)
    assert [(r.reward_update, r.fits_reward, r.reward_start, r.reference, r.policy_start) for r in rounds] == BY_HAND[name]
    assert [r.number for r in rounds] == [1, 2, 3][: len(BY_HAND[name])]
    assert [r.moved_reference for r in rounds] == [r.reference > 0 for r in rounds]
    assert all(r.restart_optimizer and r.restart_critic for r in rounds)
    assert {r.policy_update for r in rounds} == {OTHER_POLICY_UPDATE.get(name, "ppo")}
    assert {r.ensemble for r in rounds} == {ENSEMBLES.get(name)}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OTHER_POLICY_UPDATE and name not in ENSEMBLES])
def test_round_1_is_the_same_for_every_row_of_ppo(name):
    assert rounds_of(METHODS[name], 2)[0] == rounds_of(METHODS["ppo"], 2)[0]


def test_rows_that_would_only_repeat_themselves_have_one_round():
    assert num_rounds(METHODS["dpo"], 5) == num_rounds(METHODS["wpo"], 5) == 1
    assert num_rounds(Method(policy_update="dpo"), 5) == 5  # goes on from its last policy
    assert num_rounds(Method(policy_update="dpo", policy_start="sft", reward_update="nearest"), 5) == 5  # on other pairs
    assert num_rounds(Method(policy_update="dpo", policy_start="sft", reference="previous"), 5) == 5  # against another policy every round
    assert num_rounds(METHODS["rlp-spg"], 5) == num_rounds(METHODS["ppo"], 5) == 5
    with pytest.raises(ValueError, match=r"rounds is 0; at least one round"):
        num_rounds(Method(), 0)


def test_who_needs_a_reward_model():
    assert {name for name, method in METHODS.items() if not method.needs_reward} == {"dpo", "wpo"}
    assert Method(policy_update="dpo", reward_update="synthetic").needs_reward  # its old reward model picks the winners


def test_once_updates_in_round_2_alone():
    rounds = rounds_of(Method(reward_update="unweighted", update_rounds="once", reward_start="previous", policy_start="sft"), 4)
    assert [r.fits_reward for r in rounds] == [True, True, False, False]
    assert [r.reward_update for r in rounds] == [None, "unweighted", None, None]
    assert [r.reward_start for r in rounds] == ["sft", "previous", "previous", "previous"]
    assert [r.policy_start for r in rounds] == [0, 0, 0, 0]


def test_what_is_carried_on_begins_in_round_2():
    rounds = rounds_of(Method(restart_optimizer=False, restart_critic=False), 3)
    assert [(r.restart_optimizer, r.restart_critic) for r in rounds] == [(True, True), (False, False), (False, False)]


def test_where_no_refit_is_due_the_last_round_goes_on():
    """Due before rounds 3 and 5 alone: reward model, reference, optimizer and critic change then, and only then."""
    rounds = rounds_of(METHODS["ocrm"], 6, due=lambda number: number in (3, 5))
    assert [r.fits_reward for r in rounds] == [True, False, True, False, True, False]
    assert [r.reward_update for r in rounds] == [None, None, *["importance-weighted", None] * 2]
    assert [r.reference for r in rounds] == [0, 0, 2, 2, 4, 4]
    assert [r.moved_reference for r in rounds] == [False, False, True, True, True, True]
    assert [r.policy_start for r in rounds] == [0, 1, 2, 3, 4, 5]
    assert [(r.restart_optimizer, r.restart_critic) for r in rounds] == [(True, True), (False, False)] * 3
    assert [r.number for r in rounds] == [1, 2, 3, 4, 5, 6]


def test_never_due_is_uninterrupted_ppo():
    never = rounds_of(METHODS["ocrm"], 3, due=lambda number: False)
    assert never == rounds_of(Method(restart_optimizer=False, restart_critic=False), 3)


def test_a_trigger_says_nothing_of_rows_that_keep_their_reward_model():
    for name in ("ppo", "ppo-moving-reference", "rloo"):
        assert rounds_of(METHODS[name], 3, due=lambda number: False) == rounds_of(METHODS[name], 3)


def test_once_waits_for_the_first_refit_that_is_due():
    rounds = rounds_of(METHODS["frft"], 5, due=lambda number: number in (3, 5))
    assert [r.reward_update for r in rounds] == [None, None, "nearest", None, None]


def test_a_row_with_some_columns_changed():
    def plugin(name):
        return {"mine:row": Method(reference="previous"), "mine:other": 3}[name]

    changed = method_of("ocrm", {"reference": "sft", "restart_critic": False}, plugin)
    assert changed == Method(reward_update="importance-weighted", restart_critic=False) and METHODS["ocrm"].restart_critic
    assert method_of("ocrm", {}, plugin) is METHODS["ocrm"]
    assert method_of("mine:row", {"policy_update": "rloo"}, plugin) == Method(reference="previous", policy_update="rloo")
    with pytest.raises(ValueError, match=r"method 'mine:other' is a int; name a jaxrlhf.algorithms.rounds.Method"):
        method_of("mine:other", {}, plugin)
    with pytest.raises(
        ValueError, match=r"row.refernce is no column of a method; the columns are policy_update, .*restart_critic, ensemble"
    ):
        method_of("ocrm", {"refernce": "sft"}, plugin)
    with pytest.raises(ValueError, match=r"row.reference is 'moved': "):
        method_of("ocrm", {"reference": "moved"}, plugin)


def test_every_update_of_a_row_is_in_the_registry():
    assert {m.reward_update for m in METHODS.values()} - {None} == REWARD_UPDATES.keys()
    assert {
        "unweighted": unweighted, "importance-weighted": importance_weighted, "nearest": nearest, "random-subset": random_subset,
        "nearest-importance-weighted": nearest_importance_weighted, "synthetic": synthetic,
    } == REWARD_UPDATES  # fmt: skip
    assert SECTIONS_READ.keys() == REWARD_UPDATES.keys()


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ValueError, match=r"method 'ocmr' is unknown; the table has ppo, .*Did you mean 'ocrm'\?"):
        method_of("ocmr", {}, lambda name: None)
    with pytest.raises(ValueError, match=r"reward update 'importance-weigthed' is unknown.*Did you mean 'importance-weighted'\?"):
        reward_update_named("importance-weigthed", lambda name: None)  # type: ignore[arg-type,return-value]
    assert reward_update_named("mine:update", lambda name: {"mine:update": unweighted}[name]) is unweighted
    with pytest.raises(ValueError, match=r"reward update 'mine:other' is a int; name a function \(RoundContext, Pairs\)"):
        reward_update_named("mine:other", lambda name: 3)  # type: ignore[arg-type,return-value]


def test_a_row_of_the_table_is_not_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        METHODS["ppo"].reference = "previous"  # pyright: ignore[reportAttributeAccessIssue]
