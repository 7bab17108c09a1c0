"""Every registered loss, and every one added later, keeps the promises of the registry."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.losses import PAIR_LOSSES, POLICY_LOSSES, bind, hyperparameter_names


def rows(tree, keep):
    return jax.tree.map(lambda x: x[keep], tree)


def check(loss, model_side, data, count):
    """Fillers are nobody's business, micro-batches add up (loss, gradients and metrics), order does not matter."""
    whole = jax.jit(jax.value_and_grad(lambda m, d: loss(m, d), has_aux=True))
    (value, metrics), gradients = whole(model_side, data)
    assert value.shape == () and bool(jnp.isfinite(value))
    for leaf in jax.tree.leaves((metrics, gradients)):
        assert bool(jnp.all(jnp.isfinite(leaf)))
    assert any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(gradients))
    for gradient in jax.tree.leaves(gradients):
        assert bool(jnp.all(gradient[4:] == 0))

    real = slice(0, 4)
    (alone, alone_metrics), _ = jax.value_and_grad(loss, has_aux=True)(rows(model_side, real), rows(data, real))
    assert float(alone) == pytest.approx(float(value), rel=1e-5)
    assert {k: float(v) for k, v in alone_metrics.items()} == pytest.approx({k: float(v) for k, v in metrics.items()}, rel=1e-5)

    total = count(data)
    parts = [jax.value_and_grad(loss, has_aux=True)(rows(model_side, s), rows(data, s), total=total) for s in (slice(0, 3), slice(3, 6))]
    assert float(sum(part[0][0] for part in parts)) == pytest.approx(float(value), rel=1e-5)
    for name, metric in metrics.items():
        assert float(sum(part[0][1][name] for part in parts)) == pytest.approx(float(metric), rel=1e-5, abs=1e-7), name
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), parts[0][1], parts[1][1])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), joined, gradients)

    order = np.array([5, 2, 0, 4, 3, 1])
    shuffled, _ = loss(rows(model_side, order), rows(data, order))
    assert float(shuffled) == pytest.approx(float(value), rel=1e-5)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pair_losses(name, pairs):
    outputs, batch = pairs
    entry = PAIR_LOSSES[name]
    assert entry.head in ("scalar", "lm") and set(entry.columns) <= set(batch.columns)
    check(entry.loss, outputs, batch, lambda b: jnp.sum(b.row_mask_B))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_losses(name, rollout):
    stats, batch = rollout
    check(POLICY_LOSSES[name].loss, stats, batch, lambda r: jnp.sum(r.mask_BT & r.row_mask_B[:, None]))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pair_losses_read_only_the_columns_they_name_and_the_weights(name, pairs):
    outputs, batch = pairs
    entry = PAIR_LOSSES[name]
    value, _ = entry.loss(outputs, batch)
    for column in set(batch.columns) - set(entry.columns):
        batch.columns.pop(column)
    assert entry.loss(outputs, batch)[0] == value
    for column in entry.columns:
        shift = jnp.arange(6.0)
        changed = jax.tree.map(lambda x: x, batch)
        changed.columns[column] = changed.columns[column] + shift
        assert entry.loss(outputs, changed)[0] != value
    doubled = jax.tree.map(lambda x: x, batch)
    object.__setattr__(doubled, "weights_B", 2 * batch.weights_B)
    assert float(entry.loss(outputs, doubled)[0]) == pytest.approx(2 * float(value), rel=1e-5)


EFFECTS = {
    "center": 0.3, "beta": 0.7, "label_smoothing": 0.2, "clip": 0.05, "clip_high": 0.01, "dual_clip": 1.01, "entropy_coef": 0.4,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [("pair", n) for n in PAIR_LOSSES] + [("policy", n) for n in POLICY_LOSSES])
def test_every_hyperparameter_has_a_default_can_be_bound_and_matters(kind, name, pairs, rollout):
    entry = PAIR_LOSSES[name] if kind == "pair" else POLICY_LOSSES[name]
    arrays = pairs if kind == "pair" else rollout
    value, _ = entry.loss(*arrays)
    signature = inspect.signature(entry.loss)
    for parameter in hyperparameter_names(entry):
        assert signature.parameters[parameter].default is not inspect.Parameter.empty
        bound = bind(entry, **{parameter: EFFECTS[parameter]})
        assert bound._replace(loss=None) == entry._replace(loss=None)
        assert bound.loss(*arrays)[0] == functools.partial(entry.loss, **{parameter: EFFECTS[parameter]})(*arrays)[0]
        assert bound.loss(*arrays)[0] != value, parameter
        assert bound.loss(*arrays, total=1)[0] != bound.loss(*arrays)[0]


# The usual ones of the field: a config that names none of them asks for these.
DEFAULTS = {
    "bradley_terry": {"center": 0.0}, "bradley_terry_margin": {"center": 0.0},
    "dpo": {"beta": 0.1, "label_smoothing": 0.0}, "ipo": {"beta": 0.1}, "ipo_mean": {"beta": 0.1},
    "wpo": {"beta": 0.1, "label_smoothing": 0.0, "clip": 1.0},
    "ppo": {"clip": 0.2, "clip_high": None, "dual_clip": None, "entropy_coef": 0.0},
}  # fmt: skip


def test_the_losses_there_are_and_their_defaults():
    entries = {**PAIR_LOSSES, **POLICY_LOSSES}
    parameters = {name: inspect.signature(entry.loss).parameters for name, entry in entries.items()}
    assert {name: {p: parameters[name][p].default for p in hyperparameter_names(entries[name])} for name in entries} == DEFAULTS


def test_binding_an_unknown_hyperparameter_names_the_known_ones():
    with pytest.raises(TypeError, match="no hyperparameter bata; it has beta, label_smoothing"):
        bind(PAIR_LOSSES["dpo"], bata=0.1)
    with pytest.raises(TypeError, match="no hyperparameter total"):
        bind(PAIR_LOSSES["dpo"], total=1)


def test_bindings_compose(pairs):
    twice = bind(bind(PAIR_LOSSES["dpo"], beta=0.3), label_smoothing=0.1)
    assert twice.loss(*pairs)[0] == PAIR_LOSSES["dpo"].loss(*pairs, beta=0.3, label_smoothing=0.1)[0]
