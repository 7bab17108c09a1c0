"""What the checks look at: the rows, the models and a few sampled responses of a recipe, each made once, when it is first asked for."""

from dataclasses import fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from jaxrlhf import rng, sharding
from jaxrlhf.algorithms.policy_updates import POLICY_UPDATES
from jaxrlhf.algorithms.ppo import as_compiled, rollout_prompts
from jaxrlhf.algorithms.reward_update import Pairs
from jaxrlhf.algorithms.rounds import PREFERENCE, Method, method_of
from jaxrlhf.comparison.judge_client import Judge
from jaxrlhf.config import Config, PPOConfig
from jaxrlhf.data.batches import take, trim
from jaxrlhf.data.pairs import Demonstration, Pair, Prompt, ReadReport
from jaxrlhf.data.tokens import eos_ids_of, pad_id_of, tokenize_demonstrations, tokenize_pairs, tokenize_prompts
from jaxrlhf.models.hub import Loaded, eos_ids, rehead, resolve
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.pipeline import inputs
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.pipeline.stages.fixed_models import split_params
from jaxrlhf.pipeline.stages.sft import base_model, tokenizer_of
from jaxrlhf.plan.plan import Plan, plan
from jaxrlhf.plugins import plugin
from jaxrlhf.scorers import Scorer
from jaxrlhf.steps.state import joined
from jaxrlhf.storage.remote import is_url
from jaxrlhf.types import Metrics, PairBatch, PromptBatch, Rollout, TextBatch

ROWS = 8  # of a forward or backward pass
SEEN = 2000  # rows that are tokenised for the figures of lengths
WIDEST = 64  # tokens of a prompt or response in it: what is looked at does not need more
LONGEST = 48  # tokens sampled of a response
TEXT = ("seed", "sft_seed", "data", "model", "tokenizer", "pairs")  # what rows and tokens depend on
ELSEWHERE = ("name", "output", "store", "standalone", "arms", "checkpoint", "log")  # nothing that is looked at depends on them
ALL = tuple(name for name in Config.__dataclass_fields__ if name not in ELSEWHERE)
MODELS = (*TEXT, "ppo", "filter", "mesh")  # and models: as many positions as the longest response


class Subject:
    """One arm of a recipe, and the judge that will be asked."""

    def __init__(self, config: Config, judge: Judge | None = None):
        self.config, self.judge = config, judge

    def part(self, name: str) -> Any:
        """A section of the config, or a column of its method; None where there is no such method, which the first check says."""
        try:
            return getattr(self.method if hasattr(Method, name) else self.config, name)
        except Exception:
            return None

    @cached_property
    def method(self) -> Method:
        return method_of(self.config.method, self.config.row, plugin)

    @property
    def samples_pairs(self) -> bool:
        return self.config.pairs.source == "sample"

    @cached_property
    def mesh(self) -> Any:
        return sharding.mesh_of(self.config.mesh)

    @property
    def run(self) -> RunContext:
        """A run without a place: what makes models and adapters reads its config and its devices alone. They compute in float32, where what
        is not rounding is a fault."""
        config = replace(self.config, model=replace(self.config.model, dtype="float32", matmul_precision="highest"))
        return RunContext(config, cast(Any, None), Path(), RunLog(None), self.mesh)

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.config)

    @cached_property
    def demonstrations(self) -> tuple[list[Demonstration], ReadReport]:
        return inputs.demonstrations_of(self.config, self.tokenizer)

    @cached_property
    def pairs(self) -> tuple[list[Pair], list[Pair], ReadReport]:
        return inputs.pairs_of(self.config, self.tokenizer)

    @cached_property
    def prompts(self) -> tuple[list[Prompt], ReadReport]:
        return inputs.prompts_of(self.config, self.tokenizer)

    @cached_property
    def texts(self) -> tuple[TextBatch, ReadReport]:
        """The first demonstrations as tokens, and what was cut or dropped."""
        rows = self.demonstrations[0][:SEEN]
        return tokenize_demonstrations(rows, self.tokenizer, inputs.limits_of(self.config), eos_ids=eos_ids_of(self.tokenizer))

    @cached_property
    def pair_rows(self) -> list[Pair]:
        """The first pairs; where the run samples its own, a demonstration against the response to another prompt."""
        if not self.samples_pairs:
            return self.pairs[0][:SEEN]
        given = self.demonstrations[0][:SEEN]
        return [Pair(d.id, d.prompt, d.response, other.response, d.source) for d, other in pairwise(given)]

    @cached_property
    def pair_tokens(self) -> tuple[PairBatch, ReadReport]:
        return tokenize_pairs(self.pair_rows, self.tokenizer, inputs.limits_of(self.config), eos_ids=eos_ids_of(self.tokenizer))

    @cached_property
    def prompt_tokens(self) -> tuple[PromptBatch, ReadReport]:
        return tokenize_prompts(self.prompts[0][:SEEN], self.tokenizer, inputs.limits_of(self.config))

    @property
    def few_texts(self) -> TextBatch:
        return few(self.texts[0])

    @cached_property
    def few_pairs(self) -> Pairs:
        table, report = self.pair_tokens
        return Pairs([self.pair_rows[i] for i in report.rows[:ROWS]], few(table))

    @property
    def key(self) -> jax.Array:
        return rng.stream(rng.root_key(self.config.seed), "preflight")

    @cached_property
    def plan(self) -> Plan:
        """Memory and FLOPs of the run, counted."""
        rows = len(self.demonstrations[0] if self.samples_pairs else self.pairs[0])
        return plan(local(self.config), rows=rows, valid_rows=self.config.evaluation.num_prompts)

    @cached_property
    def policy(self) -> Loaded:
        """The model that SFT starts from."""
        return base_model(self.run, self.tokenizer)

    @cached_property
    def reward(self) -> Loaded:
        """The same body under a new scalar head, as a reward model starts."""
        loaded = rehead(self.policy, head="scalar", key=rng.stream(self.key, "head"))
        return loaded._replace(params=sharding.place(loaded.params, self.mesh))

    @cached_property
    def split(self) -> Any:
        """What learns of the policy, and what is frozen under adapters."""
        return split_params(self.run, self.policy, rng.stream(self.key, "adapters"))

    @cached_property
    def gold(self) -> Scorer | None:
        return inputs.gold_of(self.config, self.mesh)

    @cached_property
    def sampled(self) -> tuple[Rollout, Metrics, PPOConfig] | None:
        """A few responses of the policy that SFT starts from, sampled and scored by the programs of a round, and their section; None for a
        policy that learns from pairs."""
        if self.method.policy_update in PREFERENCE:
            return None
        own, way, policy = self.config.ppo, POLICY_UPDATES[self.method.policy_update], self.policy
        rows = sharding.rows_at_once(ROWS, ROWS, self.mesh) * way.samples(own)
        section = replace(
            own, batch_size=rows, total_episodes=rows, response_length=min(own.response_length, LONGEST), old_logp="score", loss="ppo",
            num_mini_batches=1, gradient_accumulation_steps=1, forward_batch_size=None, generation_batch_size=None, critic_warmup_updates=0,
        )  # fmt: skip
        ids = {"eos_ids": eos_ids(policy), "pad_id": pad_id_of(self.tokenizer), "vocab_size": len(self.tokenizer)}
        trainer = way.trainer(policy.model, self.reward.model, as_compiled(section), plugin, mesh=self.mesh, **ids)
        params = {"policy": joined(*self.split), "reference": policy.params, "reward": self.reward.params}
        params |= {"critic": self.reward.params} if way.critic else {}
        table = few(self.prompt_tokens[0], SEEN)
        batch = next(rollout_prompts(table, section, samples=way.samples(own), seed=self.config.seed))
        batch = sharding.place_batch(batch, self.mesh)
        completion = trainer.sample(params["policy"], batch, self.key)
        controller = {"kl_coef": np.float32(own.kl_coef), "value_bias": np.float32(0)}
        rollout, metrics = sharding.gather(trainer.score(params, (batch, completion), controller, 0.0))
        return rollout, metrics, section


def local(config: Config) -> Config:
    """The config with the copies on this machine of the models at URLs, for plans, which fetch nothing."""
    sections = {name: getattr(config, name) for name in ("model", "tokenizer", "gold")}
    copies = {name: str(resolve(one.source)) for name, one in sections.items() if one.source and is_url(one.source)}
    return replace(config, **{name: replace(sections[name], source=copy) for name, copy in copies.items()})


def few(table: Any, rows: int = ROWS) -> Any:
    """The first rows, without the padding that they share, and no wider than WIDEST on either side."""
    table = trim(take(table, np.arange(min(rows, len(table.index_B)))))
    sides = {"_BL": slice(-WIDEST, None), "_BT": slice(WIDEST)}
    cut = {one.name: getattr(table, one.name)[:, sides[one.name[-3:]]] for one in fields(table) if one.name[-3:] in sides}
    return replace(table, **cut)
