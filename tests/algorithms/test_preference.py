"""Which loss a preference row trains with, and which settings it depends on."""

import pytest

from jaxrlhf.algorithms.preference import needs_reference, preference_loss, settings_read
from jaxrlhf.algorithms.reward import pair_trainer
from jaxrlhf.config import DPOConfig
from jaxrlhf.losses import PAIR_LOSSES, bind
from jaxrlhf.plugins import plugin
from jaxrlhf.types import PairLoss


def no_hyperparameters(outputs, batch, *, total=None):
    return (outputs.rejected_B - outputs.chosen_B).sum(), {}


FREE = PairLoss("lm", (), no_hyperparameters)


def given(config, policy_update="dpo"):
    return preference_loss(config, policy_update, plugin).loss.keywords


def test_losses_by_name_with_the_hyperparameters_that_each_has():
    assert given(DPOConfig(beta=0.3, label_smoothing=0.1)) == {"beta": 0.3, "label_smoothing": 0.1}
    assert given(DPOConfig(loss="ipo", beta=0.3)) == {"beta": 0.3}
    assert given(DPOConfig(wpo_clip=None, label_smoothing=0.1), "wpo") == {"beta": 0.05, "label_smoothing": 0.1, "clip": None}
    for config, update, name in (
        (DPOConfig(), "dpo", "dpo"),
        (DPOConfig(loss="ipo_mean"), "dpo", "ipo_mean"),
        (DPOConfig(), "wpo", "wpo"),
        (DPOConfig(loss="ipo"), "wpo", "wpo"),  # a recipe's arms may share the section
        (DPOConfig(loss="wpo"), "dpo", "wpo"),
    ):
        found = preference_loss(config, update, plugin)
        assert found.loss.func is PAIR_LOSSES[name].loss and found.columns == PAIR_LOSSES[name].columns


def test_what_cannot_train_a_policy_is_refused_in_words():
    for config, message in (
        (DPOConfig(loss="dop"), r"dpo.loss 'dop' is unknown; use one of dpo, ipo, ipo_mean, wpo or module:attribute"),
        (DPOConfig(loss="bradley_terry"), r"dpo.loss 'bradley_terry' needs head 'scalar'; a policy has head 'lm', as dpo, ipo"),
        (DPOConfig(loss="math:exp"), r"'math:exp' is a builtin_function_or_method; name a jaxrlhf.types.PairLoss"),
        (
            DPOConfig(loss="ipo", label_smoothing=0.1),
            r"dpo.label_smoothing is 0.1, but dpo.loss 'ipo' has no hyperparameter",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            preference_loss(config, "dpo", plugin)
    with pytest.raises(ValueError, match=r"dpo.beta is 0.2, but dpo.loss 'mine:loss' has no hyperparameter 'beta'; leave it at 0.05"):
        preference_loss(DPOConfig(loss="mine:loss", beta=0.2), "dpo", lambda name: FREE)
    assert preference_loss(DPOConfig(loss="mine:loss"), "dpo", lambda name: FREE).loss.keywords == {}


def test_a_training_depends_on_what_its_loss_reads_alone():
    everything = set(settings_read(DPOConfig(), "dpo", PAIR_LOSSES["wpo"]))
    assert {"beta", "loss", "label_smoothing", "wpo_clip", "eval_batch_size", "learning_rate"} <= everything
    for config, update, loss, unread in (
        (DPOConfig(), "dpo", PAIR_LOSSES["dpo"], {"wpo_clip"}),
        (DPOConfig(), "wpo", bind(PAIR_LOSSES["wpo"], clip=1.0), {"loss"}),
        (DPOConfig(loss="ipo"), "dpo", PAIR_LOSSES["ipo"], {"wpo_clip", "label_smoothing"}),
        (DPOConfig(loss="mine:loss"), "dpo", FREE, {"wpo_clip", "label_smoothing", "beta", "eval_batch_size"}),
    ):
        assert everything - set(settings_read(config, update, loss)) == unread
    assert needs_reference(PAIR_LOSSES["ipo"]) and not needs_reference(FREE)


def test_equal_trainings_share_their_compilation():
    loss = preference_loss(DPOConfig(), "dpo", plugin)
    assert preference_loss(DPOConfig(), "dpo", plugin) is loss
    model = PairLoss("lm", (), no_hyperparameters)  # anything that can be a key
    assert pair_trainer(model, loss, DPOConfig(), 3, None) is pair_trainer(model, loss, DPOConfig(), 3, None)  # type: ignore[arg-type]
