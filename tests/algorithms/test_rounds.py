"""The table of methods against one written out by hand."""

import pytest

from jaxrlhf.algorithms.ocrm import importance_weighted
from jaxrlhf.algorithms.rounds import METHODS, REWARD_UPDATES, Method, method_named, reward_update_named, rounds_of
from jaxrlhf.algorithms.update import unweighted

# method: per round (reward update, fits a reward model, its start, KL reference, policy start); models by the round that made them.
BY_HAND = {
    "ppo": [(None, True, "sft", 0, 0), (None, False, "sft", 0, 1), (None, False, "sft", 0, 2)],
    "ppo-moving-reference": [(None, True, "sft", 0, 0), (None, False, "sft", 1, 1), (None, False, "sft", 2, 2)],
    "retrain": [(None, True, "sft", 0, 0), ("unweighted", True, "sft", 1, 1), ("unweighted", True, "sft", 2, 2)],
    "ocrm": [(None, True, "sft", 0, 0), ("importance-weighted", True, "sft", 1, 1), ("importance-weighted", True, "sft", 2, 2)],
    "ocrm-fixed-reference": [(None, True, "sft", 0, 0), ("importance-weighted", True, "sft", 0, 1), ("importance-weighted", True, "sft", 0, 2)],  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_rounds_by_hand(name):
    rounds = rounds_of(METHODS[name], 3)
    assert [(r.reward_update, r.fits_reward, r.reward_start, r.reference, r.policy_start) for r in rounds] == BY_HAND[name]
    assert [r.number for r in rounds] == [1, 2, 3]
    assert [r.moved_reference for r in rounds] == [r.reference > 0 for r in rounds]
    assert all(r.restart_optimizer and r.restart_critic for r in rounds)


@pytest.mark.parametrize("name", METHODS)
def test_round_1_is_the_same_for_every_row(name):
    assert rounds_of(METHODS[name], 2)[0] == rounds_of(METHODS["ppo"], 2)[0]


def test_once_updates_in_round_2_alone():
    rounds = rounds_of(Method(reward_update="unweighted", update_rounds="once", reward_start="previous", policy_start="sft"), 4)
    assert [r.fits_reward for r in rounds] == [True, True, False, False]
    assert [r.reward_update for r in rounds] == [None, "unweighted", None, None]
    assert [r.reward_start for r in rounds] == ["sft", "previous", "previous", "previous"]
    assert [r.policy_start for r in rounds] == [0, 0, 0, 0]


def test_what_is_carried_on_begins_in_round_2():
    rounds = rounds_of(Method(restart_optimizer=False, restart_critic=False), 3)
    assert [(r.restart_optimizer, r.restart_critic) for r in rounds] == [(True, True), (False, False), (False, False)]


def test_every_update_of_a_row_is_in_the_registry():
    assert {m.reward_update for m in METHODS.values()} - {None} <= REWARD_UPDATES.keys()
    assert REWARD_UPDATES["unweighted"] is unweighted and REWARD_UPDATES["importance-weighted"] is importance_weighted


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ValueError, match=r"method 'ocmr' is unknown; the table has ppo, .*Did you mean 'ocrm'\?"):
        method_named("ocmr")
    with pytest.raises(ValueError, match=r"reward update 'importance-weigthed' is unknown.*Did you mean 'importance-weighted'\?"):
        reward_update_named("importance-weigthed", lambda name: None)
    assert reward_update_named("mine:update", lambda name: name.upper()) == "MINE:UPDATE"
    with pytest.raises(ValueError, match=r"rounds is 0; at least one round"):
        rounds_of(Method(), 0)
