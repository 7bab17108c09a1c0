import functools
import logging
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxrlhf import sharding
from jaxrlhf.config import MeshConfig
from jaxrlhf.models import build_model, config_from_shape
from jaxrlhf.types import TrainState

WIDTH = 8


@pytest.fixture
def params():
    rng = np.random.default_rng(0)

    def dense(rows, columns):
        return {"kernel": rng.normal(size=(rows, columns)).astype(np.float32), "bias": np.zeros(columns, np.float32)}

    layer = {
        "attention": {n: dense(WIDTH, WIDTH) for n in ("q", "k", "v", "out")},
        "mlp": {"up": dense(WIDTH, 16), "down": dense(16, WIDTH)},
    }
    layer["mlp_norm"] = {"scale": np.ones(WIDTH, np.float32)}
    embed = {"embedding": rng.normal(size=(12, WIDTH)).astype(np.float32)}
    return {"backbone": {"embed": embed, "layers_0": layer}, "head": {"kernel": rng.normal(size=(WIDTH, 1)).astype(np.float32)}}


def make_step(optimizer=None, axis_name=None):
    """A small regression through every kind of parameter; the mean is over the global batch."""

    optimizer = optimizer or optax.adam(1e-2)

    def loss_fn(params, batch, total):
        layer = params["backbone"]["layers_0"]
        x = params["backbone"]["embed"]["embedding"][batch["tokens"]] * layer["mlp_norm"]["scale"]
        for name in ("q", "out"):
            x = jnp.tanh(x @ layer["attention"][name]["kernel"] + layer["attention"][name]["bias"])
        x = jnp.tanh(x @ layer["mlp"]["up"]["kernel"]) @ layer["mlp"]["down"]["kernel"]
        return (((x @ params["head"]["kernel"])[:, 0] - batch["target"]) ** 2).sum() / total

    def step(state, batch):
        total = jnp.float32(batch["target"].shape[0])
        total = total if axis_name is None else jax.lax.psum(total, axis_name)
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch, total)
        if axis_name is not None:
            loss, grads = jax.lax.psum((loss, grads), axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), {"loss": loss}

    return step


def make_state(params):
    params = jax.tree.map(jnp.array, params)
    return TrainState(jnp.int32(0), params, optax.adam(1e-2).init(params))


BATCH = {"tokens": np.arange(8) % 12, "target": np.linspace(-1, 1, 8).astype(np.float32)}


def trained(step, state, put=lambda batch: batch):
    losses = []
    for _ in range(3):
        state, metrics = step(state, put(BATCH))
        losses.append(float(metrics["loss"]))
    return losses, sharding.gather(state)


@pytest.mark.parametrize("axes", [(-1, 1, 1), (1, -1, 1), (1, 2, 2), (2, 1, 2)])
def test_a_mesh_gives_what_one_device_gives(params, axes):
    expected, end = trained(sharding.step(make_step, None), make_state(params))
    mesh = sharding.make_mesh(*axes)
    step = sharding.step(make_step, mesh)
    losses, state = trained(step, sharding.place(make_state(params), mesh), lambda batch: sharding.place_batch(batch, mesh))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state, end)


def test_pmap_gives_what_one_device_gives_and_keeps_an_ordinary_state(params):
    expected, end = trained(sharding.step(make_step, None), make_state(params))
    step = sharding.step(make_step, sharding.Replicas(sharding.make_mesh()))
    losses, state = trained(step, make_state(params))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state, end)
    with pytest.raises(ValueError, match="batch_size 6 does not divide over 4 data shards; try 4"):
        step(state, jax.tree.map(lambda x: x[:6], BATCH))


def test_further_arguments_of_a_step_are_the_same_on_every_device():
    def make(axis_name=None):
        def step(state, batch, key):
            return state, {"bits": jax.random.bits(key, (), jnp.uint32) + state}

        return step

    key, state = jax.random.key(3), jnp.uint32(0)
    expected = int(jax.random.bits(key, (), jnp.uint32))
    for mesh in (sharding.make_mesh(), sharding.make_mesh(2, 2, 1), sharding.Replicas(sharding.make_mesh())):
        step = sharding.step(make, mesh, donate=False)
        assert int(step(sharding.place(state, mesh), sharding.place_batch(BATCH, mesh), key)[1]["bits"]) == expected


def test_the_table_covers_parameters_and_their_moments(params):
    mesh = sharding.make_mesh(1, 2, 2)
    specs = jax.tree.map(lambda s: s.spec, sharding.shardings(make_state(params), mesh))
    layer = specs.params["backbone"]["layers_0"]
    assert layer["attention"]["q"] == {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}
    assert layer["attention"]["out"] == {"kernel": P("tensor", "fsdp"), "bias": P()}
    assert layer["mlp"]["down"]["kernel"] == P("tensor", "fsdp") and layer["mlp_norm"]["scale"] == P()
    assert specs.params["backbone"]["embed"]["embedding"] == P("tensor", "fsdp")
    assert specs.params["head"]["kernel"] == P("fsdp", None)  # one column does not split
    assert specs.opt_state[0].mu == specs.params and specs.opt_state[0].nu == specs.params
    assert specs.step == P() and specs.opt_state[0].count == P()
    both = jax.tree.map(lambda s: s.spec, sharding.shardings({"policy": params, "critic": params}, mesh))
    assert both["policy"] == both["critic"] == specs.params


def test_fsdp_keeps_its_layout_and_splits_the_memory(params):
    mesh = sharding.make_mesh(1, -1, 1)
    state = sharding.place(make_state(params), mesh)
    after, _ = sharding.step(make_step, mesh)(state, sharding.place_batch(BATCH, mesh))
    kernel = after.params["backbone"]["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == P("fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (WIDTH // 4, 16)
    assert state.params["backbone"]["layers_0"]["mlp"]["up"]["kernel"].is_deleted()  # donated


def test_what_does_not_divide_is_replicated_and_said_once(caplog):
    mesh = sharding.make_mesh(1, 2, 2)
    tree = {"odd_one": {"q": {"kernel": np.ones((8, 7), np.float32)}, "mystery": np.ones((4, 4), np.float32)}}
    with caplog.at_level(logging.WARNING):
        specs = [jax.tree.map(lambda s: s.spec, sharding.shardings(tree, mesh)) for _ in range(2)]
    assert specs[0] == {"odd_one": {"q": {"kernel": P("fsdp", None)}, "mystery": P()}}
    assert [r.message for r in caplog.records] == [
        "odd_one/mystery [4, 4]: no rule in the sharding table matches; it is replicated.",
        "odd_one/q/kernel [8, 7]: 7 does not divide over 2 tensor shards; replicated along that axis.",
    ]


def test_factored_moments_are_replicated():
    """adafactor keeps one vector a side under the parameter's name: the rule of the matrix does not fit it."""
    specs = sharding.shardings({"q": {"kernel": np.ones(8, np.float32)}}, sharding.make_mesh(1, 2, 2))
    assert specs["q"]["kernel"].spec == P()


@pytest.mark.parametrize(
    "axes, message",
    [
        ((3, 1, 1), "data=3, fsdp=1, tensor=1 needs 3 devices and there are 4"),
        ((-1, 3, 1), "4 devices do not divide by 3"),
        ((-1, -1, 1), "only one axis may be -1"),
        ((0, 1, 1), "an axis is a positive number"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*axes)


def test_a_batch_is_cut_over_data_and_fsdp():
    batch = sharding.place_batch({"x": np.arange(16).reshape(8, 2), "n": np.int32(3)}, sharding.make_mesh(2, 2, 1))
    assert [shard.data.tolist() for shard in batch["x"].addressable_shards] == np.arange(16).reshape(4, 2, 2).tolist()
    assert batch["n"].is_fully_replicated
    wide = sharding.place_batch({"x": np.arange(8)}, sharding.make_mesh(2, 1, 2))
    assert {shard.data.shape for shard in wide["x"].addressable_shards} == {(4,)}  # tensor shards see the same rows


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"^batch_size 66 does not divide over 4 data shards; try 64\.$"):
        sharding.place_batch({"x": np.zeros((66, 2))}, sharding.make_mesh(2, 2, 1))
    with pytest.raises(ValueError, match="try 4"):
        sharding.check_batch_size(3, 4)


def test_one_device_costs_nothing(params):
    """Arrays stay where and what they are, uncommitted, so that jit compiles once and passes no layouts."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    array = jnp.ones((3, 3))
    assert sharding.place(array, mesh) is array and sharding.place(array, None) is array
    placed = sharding.place(params, mesh)
    assert isinstance(placed["head"]["kernel"].sharding, jax.sharding.SingleDeviceSharding) and not placed["head"]["kernel"].committed
    sharding.place_batch({"x": np.zeros((67, 2))}, mesh)
    elsewhere = sharding.make_mesh(devices=jax.devices()[2:3])
    assert sharding.place(params, elsewhere)["head"]["kernel"].devices() == {jax.devices()[2]}


WORKER = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from jaxrlhf import sharding
from jaxrlhf.config import MeshConfig
from jaxrlhf.models import build_model, config_from_shape
mesh = sharding.make_mesh(2, 2, 1)
tree = sharding.place({"q": {"kernel": np.arange(32.0).reshape(8, 4)}}, mesh)
batch = sharding.place_batch({"x": np.arange(8.0)}, mesh)
step = sharding.step(lambda axis_name: lambda s, b: (jax.tree.map(lambda k: k + b["x"].sum(), s), {"sum": b["x"].sum()}), mesh)
tree, metrics = step(tree, batch)
assert float(metrics["sum"]) == 28.0
assert (sharding.gather(tree)["q"]["kernel"] == np.arange(32.0).reshape(8, 4) + 28).all()
"""


def test_two_processes_share_a_mesh():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, port, str(n)], env=env, stderr=subprocess.PIPE, text=True) for n in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=600)
        assert worker.returncode == 0, errors[-2000:]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"])
def test_every_matrix_of_every_family_has_a_rule(family):
    config, _ = config_from_shape({"family": family, "hidden_size": 16, "num_layers": 2, "num_heads": 2}, 32, max_positions=8)
    shapes = jax.eval_shape(build_model(config).init, jax.random.key(0))
    placed = sharding.shardings(shapes, sharding.make_mesh(1, 2, 2))
    for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(placed), strict=True):
        assert leaf.ndim < 2 or set(where.spec) == {"fsdp", "tensor"}, sharding.path_of(path)


def test_a_model_computes_on_a_mesh_what_it_computes_on_one_device():
    """Grouped heads, gates and a vocabulary table, all split: logits, sampling's cache and gradients included."""
    shape = {"family": "qwen3", "hidden_size": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2}
    model = build_model(config_from_shape(shape, 32, max_positions=16)[0])
    params = jax.jit(model.init)(jax.random.key(0))
    tokens, mask = np.arange(24, dtype=np.int32).reshape(4, 6) % 32, np.ones((4, 6), bool)

    def step(params, batch):
        def loss_fn(params):
            return model.score_tokens(params, batch["tokens"], batch["mask"], start=1).logp_BT.mean()

        _, cache = model.prefill(params, batch["tokens"], batch["mask"], length=8)
        logits, _ = model.decode(params, batch["tokens"][:, 0], cache)
        loss, grads = jax.value_and_grad(loss_fn)(params)
        return grads, {"loss": loss, "logits": logits}

    batch = {"tokens": tokens, "mask": mask}
    expected = sharding.gather(sharding.step(lambda axis_name: step, None, donate=False)(params, batch))
    mesh = sharding.make_mesh(1, 2, 2)
    made = sharding.step(lambda axis_name: step, mesh, donate=False)(sharding.place(params, mesh), sharding.place_batch(batch, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), sharding.gather(made), expected)


def test_rows_picked_at_run_time_are_dealt_out_again(caplog):
    mesh = sharding.make_mesh(2, 2, 1)
    rows, keep = sharding.place_batch(np.arange(16.0, dtype=np.float32).reshape(8, 2), mesh), sharding.constrain_rows(mesh)
    index = jnp.array([7, 0, 3, 1])
    picked = jax.jit(lambda x, i: keep({"x": x[i]}))(rows, index)["x"]
    np.testing.assert_array_equal(picked, np.asarray(rows)[np.asarray(index)])
    assert picked.sharding.spec[0] == ("data", "fsdp")
    with caplog.at_level(logging.WARNING):
        three = jax.jit(lambda x, i: keep(x[i]))(rows, index[:3])
    np.testing.assert_array_equal(three, np.asarray(rows)[[7, 0, 3]])
    assert "3 rows at once do not divide over 4 data shards" in caplog.text
    assert sharding.constrain_rows(None) is None and sharding.constrain_rows(sharding.make_mesh(1, devices=jax.devices()[:1])) is None
    assert (
        sharding.constrain_rows(sharding.make_mesh(4)) is None
    )  # there every device has its own rows, and nothing is left to the compiler
    assert sharding.constrain_rows(sharding.make_mesh(2, 2, 1)) is keep


def test_the_engine_is_chosen_by_the_config():
    four = sharding.mesh_of(MeshConfig(fsdp=2))
    assert dict(four.shape) == {"data": 2, "fsdp": 2, "tensor": 1}  # type: ignore[union-attr]
    replicas = sharding.mesh_of(MeshConfig(engine="pmap"))
    assert replicas == sharding.Replicas(sharding.make_mesh()) and sharding.data_shards(replicas) == 4
    with pytest.raises(ValueError, match=r"mesh\.fsdp and mesh\.tensor must be 1"):
        sharding.mesh_of(MeshConfig(engine="pmap", tensor=2))
    with pytest.raises(ValueError, match=r"mesh\.engine 'smap' is unknown; use jit or pmap"):
        sharding.mesh_of(MeshConfig(engine="smap"))  # type: ignore[arg-type]


EVERY_KIND = [lambda: None, sharding.make_mesh, lambda: sharding.make_mesh(2, 2, 1), lambda: sharding.Replicas(sharding.make_mesh())]


@pytest.mark.parametrize("devices", EVERY_KIND, ids=["one", "data", "fsdp", "pmap"])
def test_a_step_is_lowered_from_shapes_alone(params, devices):
    shapes = jax.eval_shape(lambda: (make_state(params), jax.tree.map(jnp.asarray, BATCH)))
    compiled = sharding.step(make_step, devices()).lower(*shapes).compile()
    assert compiled.memory_analysis() is not None and "HloModule" in compiled.as_text()


@pytest.mark.parametrize("devices", EVERY_KIND, ids=["one", "data", "fsdp", "pmap"])
def test_a_pass_returns_rows_and_metrics_of_the_global_batch(devices):
    def make(axis_name=None):
        def run(scale, batch, shift):
            total = batch["x"].sum() if axis_name is None else jax.lax.psum(batch["x"].sum(), axis_name)
            return {"y": batch["x"] * scale["s"] + shift}, {"total": total}

        return run

    mesh = devices()
    batch, scale = sharding.place_batch({"x": np.arange(8.0, dtype=np.float32)}, mesh), sharding.place({"s": np.float32(2)}, mesh)
    rows, metrics = sharding.rows_and_metrics(make, mesh)(scale, batch, np.float32(1))
    assert rows["y"].tolist() == [2.0 * n + 1 for n in range(8)] and float(metrics["total"]) == 28
    alone = sharding.rows(lambda scale, batch: batch["x"] * scale["s"], mesh)
    assert alone(scale, batch).tolist() == [2.0 * n for n in range(8)]
    assert mesh is None or alone(scale, batch).sharding.shard_shape((8,)) == (2,)
    if mesh is not None:
        with pytest.raises(ValueError, match="batch_size 6 does not divide over 4 data shards; try 4"):
            alone({"s": np.float32(2)}, {"x": np.zeros(6, np.float32)})


def test_keys_and_values_are_cut_over_rows_and_heads():
    """Two key-value heads over two tensor shards; over four, which do not divide them, they are whole."""
    config, _ = config_from_shape(
        {"family": "qwen3", "hidden_size": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2}, 32, max_positions=8
    )
    for axes, shape in (((1, 2, 2), (2, 1, 8, 4)), ((1, 1, 4), (4, 2, 8, 4))):
        mesh = sharding.make_mesh(*axes)
        model = build_model(config, **sharding.row_constraints(mesh))
        params = sharding.place(model.init(jax.random.key(0)), mesh)
        tokens, mask = sharding.place_batch((np.ones((4, 6), np.int32), np.ones((4, 6), bool)), mesh)
        _, cache = jax.jit(functools.partial(model.prefill, length=8))(params, tokens, mask)
        _, cache = jax.jit(model.decode)(params, tokens[:, 0], cache)
        assert cache.keys[0].sharding.shard_shape(cache.keys[0].shape) == cache.values[0].sharding.shard_shape((4, 2, 8, 4)) == shape
