"""Big models: which bytes are read, by whom and how often; what is written, and what stays in memory."""

import json
import os
import socket
import subprocess
import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

from jaxrlhf import models, sharding
from jaxrlhf.models import heads, hub
from jaxrlhf.models.hub import safetensors, tensor_names

GOLDEN = json.loads(tiny_models.GOLDEN.read_text())["models"]
FAMILIES = ["gpt2", "gpt_neox-old-spelling", "llama", "mistral-window", "qwen2", "qwen3"]
MESHES = [(4, 1, 1), (1, 4, 1), (1, 1, 4), (1, 2, 2), (2, 1, 2)]


def folder_of(name, path, kind="lm"):
    return tiny_models.write_folder(path / f"{name}-{kind}", tiny_models.VARIANTS[name], GOLDEN[name]["shapes"][kind])


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype == np.float32 and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def reads(monkeypatch):
    """Every slice that is asked for, as (tensor's name, bounds an axis)."""
    asked = []
    original = safetensors.TensorReader.read

    def read(self, name, index):
        asked.append((name, tuple((axis.start, axis.stop) for axis in index)))
        return original(self, name, index)

    monkeypatch.setattr(safetensors.TensorReader, "read", read)
    return asked


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_device_reads_its_own_slices_and_no_byte_is_read_twice(name, axes, tmp_path, reads):
    folder = folder_of(name, tmp_path)
    whole = models.load(folder).params
    reads.clear()
    mesh = sharding.make_mesh(*axes)
    params = models.load(folder, mesh=mesh).params
    assert_same_bits(params, whole)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == sharding.shardings(params, mesh)

    counts = {tensor: np.zeros(value.shape, int) for tensor, value in load_file(folder / "model.safetensors").items()}
    largest = dict.fromkeys(counts, 0)
    for tensor, bounds in reads:
        counts[tensor][tuple(slice(*pair) for pair in bounds)] += 1
        largest[tensor] = max(largest[tensor], int(np.prod([stop - start for start, stop in bounds])))
    assert all((count == 1).all() for count in counts.values())
    entries = {entry.name: entry for entry in tensor_names.layout(hub.read_config(folder), "lm")}
    for tensor, size in largest.items():
        leaves = [tensor_names.leaf(params, path) for path in entries[tensor].paths]
        assert size <= max(leaf.addressable_shards[0].data.size for leaf in leaves), f"{tensor}: more than one device's part at once"


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox-old-spelling"])
def test_slices_of_every_float_become_float32(name, dtype, tmp_path):
    folder = folder_of(name, tmp_path)
    tensors = {tensor: value.astype(dtype) for tensor, value in load_file(folder / "model.safetensors").items()}
    save_file({tensor: value.astype(np.float32) for tensor, value in tensors.items()}, folder / "model.safetensors")
    expected = models.load(folder).params
    save_file(tensors, folder / "model.safetensors")
    assert_same_bits(models.load(folder, mesh=sharding.make_mesh(1, 2, 2)).params, expected)


@pytest.mark.parametrize("value", [np.zeros((29, 25), np.float32), np.zeros((29, 24), np.int32)])
def test_what_does_not_fit_is_refused_before_anything_is_read(value, tmp_path, reads):
    folder = folder_of("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors") | {"lm_head.weight": value}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight in .*(shape \[29, 25\].*\[29, 24\]|is int32)"):
        models.load(folder, mesh=sharding.make_mesh(1, 4, 1))
    assert not reads


def one_layer():
    shape = {"family": "gpt_neox", "hidden_size": 32, "num_layers": 1, "num_heads": 4}
    return models.config_from_shape(shape, 30, max_positions=8)[0]


@pytest.mark.parametrize("axes", MESHES[:3])
def test_a_new_head_has_the_same_bits_on_any_mesh(axes, tmp_path):
    mesh, key = sharding.make_mesh(*axes), jax.random.key(5)
    folder = folder_of("gpt_neox-old-spelling", tmp_path)
    params = models.load(folder, head="scalar", key=key, mesh=mesh).params
    np.testing.assert_array_equal(params["head"]["kernel"], heads.init_scalar_head(key, 32)["kernel"])
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == sharding.shardings(params, mesh)


def test_a_model_from_scratch_is_made_in_parts_and_has_the_same_bits():
    mesh, key = sharding.make_mesh(1, 2, 2), jax.random.key(5)
    made, spread = (models.initialise(one_layer(), key=key, mesh=where).params for where in (None, mesh))
    assert_same_bits(spread, made)
    assert jax.tree.map(lambda leaf: leaf.sharding, spread) == sharding.shardings(spread, mesh)


def test_a_file_is_mapped_anew_before_its_pages_pile_up(tmp_path, monkeypatch):
    opened, sizes = [], []

    def safe_open(path, framework):
        opened.append(sum(sizes))
        return files_open(path, framework=framework)

    files_open = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", safe_open)
    monkeypatch.setattr(safetensors, "RELEASE_BYTES", 10_000)
    folder = folder_of("llama", tmp_path)
    expected = load_file(folder / "model.safetensors")
    reader = safetensors.TensorReader(folder)
    opened.clear()
    for name, value in expected.items():
        np.testing.assert_array_equal(reader.read(name, tuple(slice(0, n) for n in value.shape)), value)
        sizes.append(value.nbytes)
    steps = np.diff([*opened, sum(sizes)])
    assert len(steps) > 2 and (steps < 10_000 + max(sizes)).all() and (steps[:-1] >= 10_000).all()


def test_files_are_what_the_safetensors_library_writes(tmp_path):
    """Byte for byte, so that a stage keeps its hash; dtypes mixed, names beyond ASCII, a header of every length."""
    for length in range(9):
        arrays = {"b": np.arange(3, dtype=np.float16), "a" * (length + 1): np.arange(6, dtype=np.float32).reshape(2, 3)}
        arrays |= {"größe": np.array([[1.5]]), "z": np.arange(2).astype(ml_dtypes.bfloat16), "none": np.zeros((0, 4), np.float32)}
        save_file(arrays, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        tensors = [safetensors.Tensor(name, value.shape, value.dtype, lambda value=value: value) for name, value in arrays.items()]
        safetensors.write_shards(safetensors.shards_of(tensors), tmp_path)
        assert (tmp_path / safetensors.WHOLE).read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"b is float32\[4\], not float16\[3\] as announced"):
        safetensors.write_shards([[safetensors.Tensor("b", (3,), np.dtype(np.float16), lambda: np.zeros(4, np.float32))]], tmp_path)


@pytest.mark.parametrize("axes", [None, (1, 4, 1), (4, 1, 1)])
def test_saving_never_holds_the_model_a_second_time(axes, tmp_path):
    """numpy's memory while and after a model of 19 MB is saved: a few of its tensors, then nothing."""
    shape = {"family": "gpt_neox", "hidden_size": 256, "num_layers": 6, "num_heads": 4, "intermediate_size": 1024}
    config, _ = models.config_from_shape(shape, 64, max_positions=16)
    model = models.build_model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = sharding.place(jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes), axes and sharding.make_mesh(*axes))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    tracemalloc.start()
    try:
        models.save(models.Loaded(model, params, None, config), tmp_path / "out")
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 4 and left < size / 16, (size, peak, left)


WORKER = """
import sys, json, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
port, process, source, out = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
from jaxrlhf import models, sharding
from jaxrlhf.models.hub.safetensors import TensorReader
asked = []
original = TensorReader.read
def read(self, name, index):
    asked.append([name, [[axis.start, axis.stop] for axis in index]])
    return original(self, name, index)
TensorReader.read = read
mesh = sharding.make_mesh(1, 2, 2)
loaded = models.load(source, head="scalar", key=jax.random.key(2), mesh=mesh)
models.save(loaded, out + "/scalar")
json.dump(asked, open(f"{out}/asked-{process}.json", "w"))
shape = {"family": "gpt_neox", "hidden_size": 32, "num_layers": 1, "num_heads": 4}
config, _ = models.config_from_shape(shape, 30, max_positions=8)
models.save(models.initialise(config, key=jax.random.key(1), mesh=mesh), out + "/made")
models.save(models.load(source), out + "/local")
"""


def test_two_processes_read_their_own_slices_and_write_one_folder(tmp_path):
    source = folder_of("gpt_neox-old-spelling", tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", WORKER, port]
    workers = [subprocess.Popen([*command, str(n), source, tmp_path], env=env, stderr=subprocess.PIPE, text=True) for n in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=600)
        assert worker.returncode == 0, errors[-2000:]

    shapes = {tensor: value.shape for tensor, value in load_file(source / "model.safetensors").items()}
    counts = []
    for process in range(2):
        counts.append({tensor: np.zeros(shape, int) for tensor, shape in shapes.items()})
        for tensor, bounds in json.loads((tmp_path / f"asked-{process}.json").read_text()):
            counts[-1][tensor][tuple(slice(*pair) for pair in bounds)] += 1
        assert all(count.max() <= 1 for count in counts[-1].values())
    kernel = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"  # [48, 32]: fsdp, and with it the process, cuts its last axis
    assert [count[kernel].sum() for count in counts] == [48 * 16, 48 * 16] and (counts[0][kernel] + counts[1][kernel] == 1).all()

    alone = models.load(source, head="scalar", key=jax.random.key(2))
    models.save(alone, tmp_path / "expected-scalar")
    models.save(models.initialise(one_layer(), key=jax.random.key(1)), tmp_path / "expected-made")
    for got, expected in (("scalar", "expected-scalar"), ("made", "expected-made"), ("local", source.name)):
        assert (tmp_path / got / safetensors.WHOLE).read_bytes() == (tmp_path / expected / safetensors.WHOLE).read_bytes(), got
