"""Every stage, every way, on eight fake CPU devices: `python every_way.py FILE` writes what each came to, for test_every_way.py.

The stages are the package's own trainers. Only their optimizer is exchanged: for one whose state says whether it is AdamW or plain
gradient descent, so that one compilation serves both.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

from jaxrlhf import sharding  # noqa: E402
from jaxrlhf.algorithms import training  # noqa: E402
from jaxrlhf.algorithms.policy_updates import ppo_trainer  # noqa: E402
from jaxrlhf.algorithms.reward import pair_trainer  # noqa: E402
from jaxrlhf.config import DPOConfig, MeshConfig, PPOConfig, RewardConfig, SFTConfig  # noqa: E402
from jaxrlhf.data.batches import batches  # noqa: E402
from jaxrlhf.losses import PAIR_LOSSES, bind  # noqa: E402
from jaxrlhf.models import build_model, config_from_shape  # noqa: E402
from jaxrlhf.models.encoder import BertConfig, build_bert  # noqa: E402
from jaxrlhf.offline.encoders import compiled_pass  # noqa: E402
from jaxrlhf.offline.logprobs import response_logps  # noqa: E402
from jaxrlhf.plugins import plugin  # noqa: E402
from jaxrlhf.scorers.reward_model import score_responses  # noqa: E402
from jaxrlhf.steps.state import adamw, init_state  # noqa: E402
from jaxrlhf.types import Completion, PairBatch, PromptBatch, TextBatch  # noqa: E402

WAYS = {
    "one": None,
    "pmap": MeshConfig(engine="pmap"),
    "8,1,1": MeshConfig(data=8),
    "2,4,1": MeshConfig(data=2, fsdp=4),
    "2,2,2": MeshConfig(data=2, fsdp=2, tensor=2),
    "1,1,8": MeshConfig(data=1, tensor=8),
}
V, L, T, EOS = 40, 6, 5, 1
# Eight query heads on two key-value heads, which eight tensor shards do not divide; biases, gates. The critic and reward: learned
# positions, tied-table-like layers, biases everywhere.
POLICY = {"family": "qwen2", "hidden_size": 32, "num_layers": 1, "num_heads": 8, "num_kv_heads": 2, "intermediate_size": 64}
SCALAR = {"family": "gpt2", "hidden_size": 32, "num_layers": 1, "num_heads": 4, "intermediate_size": 64}
NEW = 10  # tokens sampled where texts are compared
# Rates of gradient descent: large enough that three steps move a leaf by far more than the last bit of its entries.
RATES = {"sft": 1.0, "reward": 0.5, "dpo": 1.0, "ppo": 0.1}


def tables():
    """Ragged texts: 40 of them in batches of 16, so that the last batch is half filler; 80 prompts in batches of 32."""
    rng = np.random.default_rng(0)

    def sides(n, length, left):
        lengths = rng.integers(1, length + 1, n)[:, None]
        place = np.arange(length)[None]
        mask = place >= length - lengths if left else place < lengths
        return np.where(mask, rng.integers(2, V, (n, length)), 0).astype(np.int32), mask

    def rows(n):
        return np.ones(n, bool), np.arange(n, dtype=np.int32)

    texts = TextBatch(*sides(40, L, True), *sides(40, T, False), *rows(40))
    weights = rng.uniform(0.2, 3.0, 40).astype(np.float32)
    logps = {f"reference_{side}_logp": rng.normal(-15, 1, 40).astype(np.float32) for side in ("chosen", "rejected")}
    row_mask, index = rows(40)
    pairs = PairBatch(*sides(40, L, True), *sides(40, T, False), *sides(40, T, False), weights, row_mask, index, logps)
    prompts = PromptBatch(*sides(80, L, True), *rows(80))
    return texts, pairs, prompts


def exchanged(schedule, *, weight_decay, **betas):
    """AdamW, or x ← x − rate · g where the state's rate is above 0. `RATE` is what new states are given."""
    inner = adamw(lambda count: 1e-3, weight_decay=0.1, **(betas | {"max_grad_norm": None, "adam_epsilon": 1e-5}))

    def update(grads, state, params=None):
        rate, moments = state
        moved, moments = inner.update(grads, moments, params)
        return jax.tree.map(lambda m, g: jnp.where(rate > 0, -rate * g, m), moved, grads), (rate, moments)

    return optax.GradientTransformation(lambda params: (jnp.float32(exchanged.rate), inner.init(params)), update)


def flat(tree):
    return {sharding.path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(sharding.gather(tree))}


class Way:
    """One way of running, its models, and what it came to: {"stage/optimizer/leaf": array}."""

    def __init__(self, name):
        self.mesh = None if WAYS[name] is None else sharding.mesh_of(WAYS[name])
        held = sharding.row_constraints(self.mesh)
        self.policy, self.scalar = (
            build_model(config_from_shape(shape, V, max_positions=L + NEW)[0], head=head, **held)
            for shape, head in ((POLICY, "lm"), (SCALAR, "scalar"))
        )
        self.found = {}

    def trained(self, stage, params, optimizer, run, controller=None):
        for kind, rate in (("sgd", RATES[stage]), ("adamw", 0.0)):
            exchanged.rate = rate
            state = init_state(jax.tree.map(jnp.array, params), optimizer, {name: jnp.float32(x) for name, x in (controller or {}).items()})
            self.found |= {f"{stage}/{kind}/{path}": leaf for path, leaf in flat(run(sharding.place(state, self.mesh)).params).items()}

    def supervised(self, stage, table, trainer, params):
        optimizer, step = trainer

        def run(state):
            for batch in batches(table, 16, seed=1, epochs=1):
                state, _ = step(state, sharding.place_batch(batch, self.mesh))
            return state

        self.trained(stage, params, optimizer, run)

    def everything(self, lm, scalar, completions):
        texts, pairs, _ = tables()
        how = {"batch_size": 16, "gradient_accumulation_steps": 2}
        bt = bind(PAIR_LOSSES["bradley_terry"], center=0.0)
        dpo = bind(PAIR_LOSSES["dpo"], beta=0.1, label_smoothing=0.1)
        self.supervised("sft", texts, training.sft_trainer(self.policy, SFTConfig(**how), 3, self.mesh), lm)
        self.supervised("reward", pairs, pair_trainer(self.scalar, bt, RewardConfig(**how), 3, self.mesh), scalar)
        self.supervised("dpo", pairs, pair_trainer(self.policy, dpo, DPOConfig(**how), 3, self.mesh), lm)
        trainer = self.ppo()
        placed, frozen = sharding.place(lm, self.mesh), sharding.place(scalar, self.mesh)
        self.passes(placed, frozen, texts, trainer)
        reference = sharding.place(jax.tree.map(lambda x: np.float32(1.1) * x, lm), self.mesh)
        return self.update(trainer, lm, scalar, {"reference": reference, "reward": frozen}, completions)

    def ppo(self):
        config = PPOConfig(
            batch_size=32, total_episodes=96, num_ppo_epochs=2, num_mini_batches=2, gradient_accumulation_steps=2, response_length=NEW,
            temperature=0.9, adaptive_kl=True, kl_target=0.95, kl_horizon=200, whiten_rewards=True, vf_coef=0.5, missing_eos_penalty=1.0,
            forward_batch_size=16,
        )  # fmt: skip
        return ppo_trainer(self.policy, self.scalar, config, plugin, eos_ids=(EOS,), pad_id=0, vocab_size=V, mesh=self.mesh)

    def passes(self, lm, scalar, texts, trainer):
        """What is computed without training, at equal weights."""
        self.found["logps"] = response_logps(self.policy, lm, texts, temperature=0.7, batch_size=16, mesh=self.mesh)
        self.found["scores"] = score_responses(self.scalar, scalar, texts, batch_size=16, mesh=self.mesh, bias=0.25)
        bert = build_bert(BertConfig("bert", V, 32, 1, 4, 64, 16, 2))
        words = sharding.place(bert.init(jax.random.key(4)), self.mesh)
        rows = sharding.place_batch((texts.response_BT, texts.response_mask_BT), self.mesh)
        self.found["vectors"] = sharding.gather(compiled_pass(bert.encode, self.mesh)(words, rows))
        self.completions = []
        for n, batch in enumerate(prompt_batches()):
            done = trainer.sample(lm, sharding.place_batch(batch, self.mesh), jax.random.fold_in(jax.random.key(2), n))
            self.completions.append(sharding.gather(done))
        self.found |= {name: np.stack([getattr(done, name) for done in self.completions]) for name in ("tokens_BT", "mask_BT", "logp_BT")}

    def update(self, trainer, lm, scalar, frozen, completions):
        """Three updates on texts that are the same for all ways: their scores, then two epochs of two minibatches of two microbatches."""
        given = self.completions if completions is None else completions

        def run(state):
            for n, (batch, done) in enumerate(zip(prompt_batches(), given, strict=True)):
                texts = sharding.place_batch((batch, Completion(done.tokens_BT, done.mask_BT, done.logp_BT)), self.mesh)
                rollout, metrics = trainer.score({**state.params, **frozen}, texts, state.controller, 0.25)
                if n == 0:
                    self.found |= {f"rollout/{name}": leaf for name, leaf in flat(rollout).items()}
                    self.found |= {f"metrics/{name}": np.asarray(value) for name, value in metrics.items()}
                state, _ = trainer.update(state, rollout, jax.random.fold_in(jax.random.key(3), n))
            self.found["ppo/kl_coef"] = np.asarray(state.controller["kl_coef"])
            return state

        self.trained("ppo", {"policy": lm, "critic": scalar}, trainer.optimizer, run, {"kl_coef": 0.05, "value_bias": 0.1})
        return given


def prompt_batches():
    return batches(tables()[2], 32, seed=1, epochs=1)


def main(file):
    training.adamw = exchanged
    one = Way("one")
    # Away from where training starts: attention that looks somewhere, a scalar head and biases that are not zero.
    rng = np.random.default_rng(5)
    lm, scalar = (
        jax.tree.map(lambda x: (x + rng.normal(0, 0.15, x.shape)).astype(np.float32), jax.device_get(model.init(jax.random.key(0))))
        for model in (one.policy, one.scalar)
    )
    starts = {"sft": lm, "reward": scalar, "dpo": lm, "ppo": {"policy": lm, "critic": scalar}}
    results = {f"start/{stage}/{path}": leaf for stage, tree in starts.items() for path, leaf in flat(tree).items()}
    completions = None
    for name in WAYS:
        way = one if name == "one" else Way(name)
        completions = way.everything(lm, scalar, completions)
        results |= {f"{name}|{key}": value for key, value in way.found.items()}
    np.savez(file, **results)


if __name__ == "__main__":
    main(sys.argv[1])
