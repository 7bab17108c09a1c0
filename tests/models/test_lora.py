"""Adapters: nothing at zero, a thin update when merged, and alone in gradients, moments and donated memory, on every kind of mesh."""

import importlib
import weakref
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from jaxrlhf import sharding
from jaxrlhf.losses import PAIR_LOSSES, bind
from jaxrlhf.models import build_model, config_from_hf, hub
from jaxrlhf.models.lora import TARGETS, adapters, merged
from jaxrlhf.steps.pair import make_pair_step
from jaxrlhf.steps.state import init_state, joined
from jaxrlhf.types import PairBatch

saving = importlib.import_module("jaxrlhf.models.hub.save")  # the package has a function of that name

R, ALPHA, START = 2, 6.0, 3
FAMILIES = ("gpt2", "gpt_neox-old-spelling", "llama")


@cache
def made(name: str) -> Any:
    """A model of one layer, its parameters, and the two halves of them."""
    config = config_from_hf({**tiny_models.VARIANTS[name], "initializer_range": 0.3, **ONE_LAYER})
    model = build_model(config)
    params = model.init(jax.random.key(1))
    learned, frozen = adapters(params, jax.random.key(2), r=R, alpha=ALPHA)
    return SimpleNamespace(config=config, model=model, params=params, learned=learned, frozen=frozen, adapted=joined(learned, frozen))


ONE_LAYER = {"num_hidden_layers": 1, "n_layer": 1}


def noisy(learned):
    """Adapters that have learned something: B is not zero any more."""
    return jax.tree.map(lambda x: x + 0.2 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), learned)


def leaves(tree) -> dict[str, Any]:
    return {sharding.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def outputs(model, params):
    """Logits of the whole text, statistics of its tokens, and what the sampler sees of it."""
    tokens, mask = tiny_models.padded("left")

    @jax.jit
    def everything(params):
        first, cache = model.prefill(params, tokens[:, :-1], mask[:, :-1], length=tokens.shape[1])
        last, _ = model.decode(params, tokens[:, -1], cache)
        return model.apply(params, tokens, mask).logits, model.score_tokens(params, tokens, mask, start=START), first, last

    return everything(params)


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_adapters_change_no_bit(name):
    """Operation by operation. Compiled, the extra terms may move a fusion's border, and with it the order of a sum."""
    case, (tokens, mask) = made(name), tiny_models.padded("left")
    expected = case.model.apply(case.params, tokens, mask).logits
    np.testing.assert_array_equal(case.model.apply(case.adapted, tokens, mask).logits, expected)
    if name == "llama":
        model = build_model(case.config, dtype="bfloat16")
        np.testing.assert_array_equal(model.apply(case.adapted, tokens, mask).logits, model.apply(case.params, tokens, mask).logits)
    compiled = jax.jit(case.model.apply)(case.adapted, tokens, mask).logits
    np.testing.assert_allclose(compiled, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_merged_weights_compute_what_adapters_do(name):
    """(x·A)·B + x·W against x·(W + A·B): a sum in another order, in float32. In the whole text, its statistics, and under the sampler."""
    case, (tokens, mask) = made(name), tiny_models.padded("left")
    adapted = joined(noisy(case.learned), case.frozen)
    ordinary = merged(adapted)
    assert jax.tree.structure(ordinary) == jax.tree.structure(case.params)
    found, expected = outputs(case.model, adapted), outputs(case.model, ordinary)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)
    np.testing.assert_allclose(found[3], found[0][:, -1], atol=2e-5)  # sampling with a cache sees the adapters too
    assert np.abs(found[0] - case.model.apply(case.params, tokens, mask).logits)[mask].max() > 0.1


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox-old-spelling"])
def test_saving_merges_a_tensor_at_a_time(name, tmp_path, monkeypatch):
    """The kernels of one tensor (q, k and v are one here), and no second model beside the adapted one."""
    case, alive, original = made(name), [], saving.merged
    adapted = joined(noisy(case.learned), case.frozen)

    def watched(part):
        alive[:] = [ref for ref in alive if ref() is not None]
        assert len(alive) <= 2
        out = original(part)
        alive.append(weakref.ref(out["kernel"]))
        return out

    monkeypatch.setattr(saving, "merged", watched)
    hub.save(hub.Loaded(case.model, adapted, None, case.config), tmp_path / "model")
    assert len(alive) <= 3
    jax.tree.map(np.testing.assert_array_equal, hub.load(tmp_path / "model").params, merged(adapted))


def test_the_rest_is_the_model_itself():
    """No second copy: its arrays are those of the base, and the update of W is A·B·α/r."""
    case = made("gpt_neox-old-spelling")
    base, rest, learned = leaves(case.params), leaves(case.frozen), leaves(case.learned)
    assert all(rest[path] is leaf for path, leaf in base.items())
    assert {path.rsplit("/", 1)[1] for path in rest.keys() - base.keys()} == {"lora_scale"}
    assert {path.rsplit("/", 1)[1] for path in learned} == {"lora_a", "lora_b"} and not learned.keys() & rest.keys()
    assert all(not leaf.any() for path, leaf in learned.items() if path.endswith("lora_b"))
    at = "backbone/layers_0/mlp/down"
    a = learned[f"{at}/lora_a"]
    assert a.shape == (case.config.intermediate_size, R) and float(a.std()) == pytest.approx(a.shape[0] ** -0.5, rel=0.3)
    given = leaves(noisy(case.learned))
    update = leaves(merged(joined(noisy(case.learned), case.frozen)))[f"{at}/kernel"] - base[f"{at}/kernel"]
    expected = np.asarray(given[f"{at}/lora_a"], np.float64) @ np.asarray(given[f"{at}/lora_b"], np.float64) * ALPHA / R
    np.testing.assert_allclose(update, expected, atol=1e-5)


def test_targets_are_those_named_and_those_that_are_there():
    case = made("gpt2")
    names = {path.split("/")[-2] for path in leaves(case.learned)}
    assert names == set(TARGETS) - {"gate"}
    some, _ = adapters(case.params, jax.random.key(0), r=1, alpha=1.0, targets=("q", "v"))
    assert {path.split("/")[-2] for path in leaves(some)} == {"q", "v"}
    with pytest.raises(ValueError, match="none of the targets gate is a kernel"):
        adapters(case.params, jax.random.key(0), r=1, alpha=1.0, targets=("gate",))
    with pytest.raises(ValueError, match="rank r of an adapter is 0"):
        adapters(case.params, jax.random.key(0), r=0, alpha=1.0)


def pairs(rows: int = 8) -> PairBatch:
    """Ragged pairs whose sides differ in a token that can be learned; the last row only fills the batch."""
    random = np.random.default_rng(0)
    prompt, mask = random.integers(4, 29, (rows, 4)), np.ones((rows, 4), bool)
    mask[1, :2] = False
    chosen, rejected = random.integers(4, 29, (2, rows, 4))
    chosen[:, 0], rejected[:, 0] = 2, 3
    lengths = np.arange(4) < random.integers(1, 5, (2, rows, 1))
    columns = {"reference_chosen_logp": np.full(rows, -12.0, np.float32), "reference_rejected_logp": np.full(rows, -12.0, np.float32)}
    sides = (chosen.astype(np.int32), lengths[0], rejected.astype(np.int32), lengths[1])
    ones = np.ones(rows, np.float32)
    return PairBatch(prompt.astype(np.int32), mask, *sides, ones, np.arange(rows) < rows - 1, np.arange(rows, dtype=np.int32), columns)  # type: ignore[arg-type]


def trainer(mesh, optimizer):
    model, loss = made("llama").model, bind(PAIR_LOSSES["dpo"], beta=0.5)
    keep = sharding.constrain_rows(mesh)
    return sharding.step(lambda axis_name: make_pair_step(model, loss, optimizer, axis_name=axis_name, constrain_rows=keep), mesh)


def test_adapters_learn_alone():
    """A compiled step gives back adapters and their moments, over the memory of the old ones; the base is neither donated nor moved."""
    case, optimizer = made("llama"), optax.adam(2e-2)
    state, batch = init_state(jax.tree.map(jnp.copy, case.learned), optimizer), pairs()
    step = trainer(None, optimizer)
    analysis = step.lower(state, batch, case.frozen).compile().memory_analysis()
    size = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for name, tree in {"state": state, "base": case.frozen}.items()}
    assert analysis.alias_size_in_bytes == size["state"] < 0.5 * size["base"]
    assert analysis.output_size_in_bytes < size["state"] + 1024  # metrics
    before, losses = jax.tree.map(np.asarray, case.frozen), []
    for _ in range(12):
        state, metrics = step(state, batch, case.frozen)
        losses.append(float(metrics["loss/pair"]))
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state)} <= {leaf.shape for leaf in jax.tree.leaves(case.learned)} | {()}
    assert losses[-1] < 0.5 * losses[0]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(case.frozen))
    jax.tree.map(np.testing.assert_array_equal, case.frozen, before)


@pytest.mark.parametrize("axes", [(4, 1, 1), (1, 2, 2), "pmap"], ids=str)
def test_a_mesh_takes_the_same_step(axes):
    case, optimizer = made("llama"), optax.sgd(1.0)
    learned = noisy(case.learned)
    expected, _ = trainer(None, optimizer)(init_state(noisy(learned), optimizer), pairs(), case.frozen)
    mesh = sharding.Replicas(sharding.make_mesh(4)) if axes == "pmap" else sharding.make_mesh(*axes)
    state, frozen = sharding.place(init_state(noisy(learned), optimizer), mesh), sharding.place(case.frozen, mesh)
    state, _ = trainer(mesh, optimizer)(state, sharding.place_batch(pairs(), mesh), frozen)
    for (path, a), b, start in zip(
        leaves(state.params).items(), jax.tree.leaves(expected.params), jax.tree.leaves(noisy(learned)), strict=True
    ):
        moved = np.linalg.norm(b - start)
        assert moved > 1e-4 and np.linalg.norm(sharding.gather(a) - b) <= 1e-4 * moved, path


def test_adapters_are_cut_as_their_kernels_are():
    case, mesh = made("llama"), sharding.make_mesh(1, 2, 2)
    specs = {path: leaf.spec for path, leaf in leaves(sharding.shardings(case.adapted, mesh)).items()}
    for name in TARGETS:
        at = f"backbone/layers_0/{'mlp' if name in ('up', 'gate', 'down') else 'attention'}/{name}"
        rows, columns = specs[f"{at}/kernel"]
        a, b = (tuple(specs[f"{at}/{leaf}"]) for leaf in ("lora_a", "lora_b"))
        assert a == (rows,) and b == (None, columns), name
