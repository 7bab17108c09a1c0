"""What the devices send each other in every compiled step, counted in the programs themselves with loops multiplied in.

The programs are compiled for eight fake devices in a process of their own (this file, run as a script): no array is ever made. All sizes
are chosen so that an axis is known by its length, whole or cut in 2, 4 or 8.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROWS, PROMPT, RESPONSE = 64, 5, 9
VOCAB, WIDTH, INNER, HEADS = 8 * 19, 8 * 6, 8 * 17, 8
EPOCHS, MINIBATCHES = 2, 2
CASES = {  # name → (what, mesh, accumulate)
    "ppo": ("ppo", (8, 1, 1), 1),
    "ppo-accumulate": ("ppo", (8, 1, 1), 2),
    "sft-accumulate": ("sft", (8, 1, 1), 2),
    "reward": ("reward", (8, 1, 1), 1),
    "score": ("score", (8, 1, 1), 1),
    "sample": ("sample", (8, 1, 1), 1),
    "fsdp-accumulate": ("sft", (1, 8, 1), 2),
    "fsdp-sample": ("sample", (2, 4, 1), 1),
    "tensor": ("sft", (2, 2, 2), 1),
}


def compile_all() -> None:
    """Prints {case: {"sent": [[kind, shapes, bytes, times], …], "parameters": {tree: [shapes, bytes]}}} as JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_num_cpu_devices", 8)
    from jaxrlhf import sharding
    from jaxrlhf.algorithms.policy_updates import ppo_trainer
    from jaxrlhf.algorithms.reward import pair_trainer, reward_loss
    from jaxrlhf.algorithms.training import sft_trainer
    from jaxrlhf.config import PPOConfig, RewardConfig, SFTConfig
    from jaxrlhf.models import build_model, config_from_shape
    from jaxrlhf.plan import hlo
    from jaxrlhf.rollouts.generate import sampler
    from jaxrlhf.steps.state import init_state
    from jaxrlhf.types import Completion, PairBatch, PromptBatch, Rollout, TextBatch

    def no_plugin(name: str):
        raise AssertionError(name)

    def array(dtype, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    ids_BL, mask_BL = array(jnp.int32, ROWS, PROMPT), array(jnp.bool_, ROWS, PROMPT)
    ids_BT, mask_BT, x_BT = (array(dtype, ROWS, RESPONSE) for dtype in (jnp.int32, jnp.bool_, jnp.float32))
    x_B, mask_B, index_B, scalar = array(jnp.float32, ROWS), array(jnp.bool_, ROWS), array(jnp.int32, ROWS), array(jnp.float32)
    texts = TextBatch(ids_BL, mask_BL, ids_BT, mask_BT, mask_B, index_B)
    pairs = PairBatch(ids_BL, mask_BL, ids_BT, mask_BT, ids_BT, mask_BT, x_B, mask_B, index_B)
    prompts, completion = PromptBatch(ids_BL, mask_BL, mask_B, index_B), Completion(ids_BT, mask_BT, x_BT)
    rollout = Rollout(ids_BL, mask_BL, ids_BT, mask_BT, mask_BT, x_BT, x_BT, x_BT, x_BT, x_BT, x_B, mask_B)

    shape = {"family": "gpt_neox", "hidden_size": WIDTH, "num_layers": 1, "num_heads": HEADS, "intermediate_size": INNER}
    decoder, _ = config_from_shape(shape, VOCAB, max_positions=PROMPT + RESPONSE)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def lowered(what: str, axes: tuple[int, int, int], accumulate: int):
        mesh = sharding.make_mesh(*axes)
        policy, critic = (build_model(decoder, head=head, **sharding.row_constraints(mesh)) for head in ("lm", "scalar"))
        params = {"policy": jax.eval_shape(policy.init, key), "critic": jax.eval_shape(critic.init, key)}
        if what == "sft":
            optimizer, step = sft_trainer(policy, SFTConfig(gradient_accumulation_steps=accumulate), 10, mesh)
            return step.lower(jax.eval_shape(lambda p: init_state(p, optimizer), params["policy"]), texts), params["policy"]
        if what == "reward":
            config = RewardConfig(gradient_accumulation_steps=accumulate)
            optimizer, step = pair_trainer(critic, reward_loss(config, no_plugin), config, 10, mesh)
            return step.lower(jax.eval_shape(lambda p: init_state(p, optimizer), params["critic"]), pairs), params["critic"]
        config = PPOConfig(
            batch_size=ROWS, num_ppo_epochs=EPOCHS, num_mini_batches=MINIBATCHES, gradient_accumulation_steps=accumulate,
            response_length=RESPONSE, whiten_rewards=True,
        )  # fmt: skip
        trainer = ppo_trainer(policy, critic, config, no_plugin, eos_ids=(1,), pad_id=0, vocab_size=None, mesh=mesh)
        controller = {"kl_coef": scalar, "value_bias": scalar}
        if what == "ppo":
            state = jax.eval_shape(lambda p, c: init_state(p, trainer.optimizer, c), params, controller)
            return trainer.update.lower(state, rollout, key), params
        if what == "score":
            everything = {**params, "reference": params["policy"], "reward": params["critic"]}
            return trainer.score.lower(everything, (prompts, completion), controller, scalar), params
        how = {"max_new_tokens": RESPONSE, "eos_ids": (1,), "pad_id": 0, "greedy": False, "top_k": 0, "top_p": 1.0, "vocab_size": None}
        return sampler(policy, mesh, **how).lower(params["policy"], (ids_BL, mask_BL, index_B), key, scalar), params["policy"]

    found = {}
    for name, case in CASES.items():
        program, params = lowered(*case)
        # Machine code is not looked at: the cheapest will do. Exchanges are decided before it is made.
        quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        text = program.compile(compiler_options=quick).as_text()
        sent = [[one.kind, [shape.dims for shape in one.operands + one.results], one.bytes, one.times] for one in hlo.collectives(text)]
        leaves = jax.tree.leaves(params)
        size = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        found[name] = {"sent": sent, "shapes": [leaf.shape for leaf in leaves], "bytes": size}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def programs():
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[2] / ".cache" / "jax"))
    options = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=os.environ | options, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(CASES)
    return found


def shapes(sent) -> set[tuple[int, ...]]:
    return {tuple(shape) for one in sent for shape in one[1]}


def gradients(program, steps: int) -> list:
    """The exchanges of one optimizer step, after looking at each: sums of arrays with the shape of a parameter, and of scalars."""
    every_step = [one for one in program["sent"] if one[3] == steps]
    assert {one[0] for one in every_step} == {"all-reduce"}
    assert shapes(every_step) <= {tuple(shape) for shape in program["shapes"]} | {()}
    return every_step


@pytest.mark.parametrize("name", ["ppo", "ppo-accumulate"])
def test_a_ppo_update_sends_its_gradients_once_an_optimizer_step_and_its_rollout_once(programs, name):
    program = programs[name]
    steps = EPOCHS * MINIBATCHES
    assert sum(one[2] for one in gradients(program, steps)) == pytest.approx(program["bytes"], rel=0.05)
    once = [one for one in program["sent"] if one[3] != steps]
    # For the shuffle every device gets all rows of the rollout: its [B, L], [B, T] and [B] arrays, once for all epochs.
    assert all(kind == "all-gather" and times == 1 for kind, _, _, times in once)
    gathered = {shape for one in once for shape in map(tuple, one[1]) if shape[0] == ROWS}
    assert gathered == {(ROWS, PROMPT), (ROWS, RESPONSE), (ROWS,)}
    of_floats, of_masks = 4 * (PROMPT + 6 * RESPONSE), PROMPT + 2 * RESPONSE + 1
    assert 0 < sum(one[2] for one in once) <= ROWS * (of_floats + of_masks + 4)


@pytest.mark.parametrize("name", ["sft-accumulate", "reward"])
def test_a_supervised_step_sends_its_gradients_once_and_nothing_else(programs, name):
    program = programs[name]
    assert sum(one[2] for one in gradients(program, 1)) == pytest.approx(program["bytes"], rel=0.05)
    assert all(one[3] == 1 for one in program["sent"])


def test_scoring_sends_sums_for_whitening_and_metrics_alone(programs):
    assert shapes(programs["score"]["sent"]) == {()}
    assert {(kind, times) for kind, _, _, times in programs["score"]["sent"]} == {("all-reduce", 1)}


def test_sampling_sends_nothing(programs):
    assert programs["sample"]["sent"] == []


WIDTHS = {size // cut for size in (VOCAB, WIDTH, INNER) for cut in (1, 2, 4, 8)}
VOCABULARY = {VOCAB // cut for cut in (1, 2, 4, 8)}
# A position axis, alone or flattened with rows: 5, 9, 13 or 14 times a power of two. No width is one.
POSITIONS = {length * 2**n for length in (PROMPT, RESPONSE, PROMPT + RESPONSE - 1, PROMPT + RESPONSE) for n in range(8)}


def activations(sent, widths=WIDTHS) -> set[tuple[int, ...]]:
    """What is exchanged that has an axis of positions and one of `widths`."""
    return {shape for shape in shapes(sent) if POSITIONS & set(shape) and widths & set(shape)}


def test_the_axes_can_be_told_apart():
    assert not WIDTHS & POSITIONS


@pytest.mark.parametrize("name", ["fsdp-accumulate", "fsdp-sample"])
def test_cut_parameters_are_gathered_and_activations_stay(programs, name):
    program = programs[name]
    gathered = [one for one in program["sent"] if one[0] == "all-gather"]
    assert gathered and all(one[3] == 1 for one in gathered)  # not again in every microbatch, nor for every token
    assert activations(program["sent"]) == set()
    assert {one[0] for one in program["sent"]} <= {"all-gather", "all-reduce", "reduce-scatter"}
    if name == "fsdp-sample":
        (stop,) = [one for one in program["sent"] if one[0] == "all-reduce"]  # whether all rows have ended, after every token
        assert shapes([stop]) == {()} and stop[3] is None


def test_a_tensor_mesh_adds_up_partial_products_and_never_gathers_the_vocabulary(programs):
    program = programs["tensor"]
    assert activations(program["sent"], VOCABULARY) == set()
    assert activations([one for one in program["sent"] if one[0] != "all-reduce"]) == set()
    gathered = shapes(one for one in program["sent"] if one[0] == "all-gather")
    assert gathered and not any({VOCAB, INNER} & set(shape) for shape in gathered)  # kernels stay cut over tensor
    added = {shape for one in program["sent"] if one[0] == "all-reduce" for shape in activations([one])}
    rows = ROWS // 4
    assert added == {(rows, PROMPT + RESPONSE - 1, WIDTH), (rows, RESPONSE, WIDTH)}


if __name__ == "__main__":
    compile_all()
