"""The compiled programs of a run, in the order it runs them, each with the shapes it is called with and all that is in memory meanwhile.

They come from the same trainers and passes that the stages use (`run/models.py`, `run/data.py`, `run/preference.py`, `run/evaluate.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxrlhf import sharding
from jaxrlhf.algorithms.ppo import POLICY_UPDATES, as_compiled, passes_of
from jaxrlhf.algorithms.preference import REFERENCE, needs_reference, preference_loss, preference_trainer
from jaxrlhf.algorithms.reward import reward_loss, reward_trainer
from jaxrlhf.algorithms.rounds import PREFERENCE, SECTIONS_READ, Round
from jaxrlhf.algorithms.supervised import sft_trainer
from jaxrlhf.config import Config
from jaxrlhf.models.encoder import build_bert
from jaxrlhf.models.lora import adapters
from jaxrlhf.offline.logprobs import logp_pass
from jaxrlhf.plugins import plugin
from jaxrlhf.rollouts.generate import sampler
from jaxrlhf.run.ensemble import spread_of
from jaxrlhf.run.inputs import gold_limits
from jaxrlhf.run.plan_counts import Counts
from jaxrlhf.run.plan_models import KEY, Subjects, gold_model, models_of, shapes_of
from jaxrlhf.run.plan_shapes import BIAS, NUMBER, bools, bytes_on_device, floats, ints, pairs, texts
from jaxrlhf.scorers.reward_model import score_pass
from jaxrlhf.steps.state import init_state, joined
from jaxrlhf.types import Completion, Params, PromptBatch, Rollout


@dataclass(frozen=True)
class Phase:
    """One program: `function.lower(*arguments)` is what the run compiles.

    `held`: trees of shapes that are in memory while it runs, by name, arguments and others; rows apart. `rows`: the arrays that have
    rows. `calls` in a whole run, None where the number of rows is not known. `tokens` of a call; `loop`: rounds of a loop that may end
    early (sampling), at most. `layers` of the decoder it runs; 0: no decoder.
    """

    stage: str
    name: str
    function: sharding.Compiled
    arguments: tuple[Any, ...]
    held: dict[str, Any]
    rows: Any
    calls: int | None
    tokens: int
    layers: int
    knobs: tuple[str, ...]
    loop: int = 1
    learned: Any = None  # the tree that has gradients, in a training step

    @property
    def title(self) -> str:
        return f"{self.stage}: {self.name}"


@dataclass(frozen=True)
class Planner:
    """What the phases of one config are made from."""

    config: Config
    subjects: Subjects
    counts: Counts
    mesh: Any

    def phases(self) -> list[Phase]:
        """Every program once for each set of what is in memory beside it."""
        found = [self.sft()]
        if self.config.pairs.source == "sample":
            found += self.sampling("pairs", self.config.pairs.batch_size, {"policy": self.policy}, self.counts.pairs_sampled)
            found += self.gold("pairs", {"policy": self.policy}, self.counts.pairs_sampled)
        rounds = self.counts.rounds
        if any(one.fits_reward for one in rounds):
            found += self.reward(sum(one.fits_reward for one in rounds))
        for one in rounds:
            if one.reward_update is not None and one is next(r for r in rounds if r.reward_update is not None):
                found += self.update(one)
        found += self.policies()
        found += self.evaluation()
        return found

    # The models' parameters as shapes.

    @property
    def _models(self):
        return models_of(self.config, self.subjects, self.mesh)

    @property
    def policy(self) -> Params:
        return shapes_of(self._models[0])

    @property
    def scalar(self) -> Params:
        return shapes_of(self._models[1])

    def halves(self) -> tuple[Params, Params | None]:
        """(what learns of the policy, the frozen rest): its adapters and its base, or all of it and None."""
        lora = self.config.lora
        if not lora.r:
            return self.policy, None
        how = {"r": lora.r, "alpha": lora.alpha, "targets": lora.target_modules}
        return jax.eval_shape(lambda params, key: adapters(params, key, **how), self.policy, KEY)

    @property
    def gold_held(self) -> dict[str, Any]:
        """The gold model, which stays in memory for as long as a stage has texts for it."""
        if self.subjects.gold is None:
            return {}
        return {"gold": shapes_of(gold_model(self.config, self.subjects.gold, self.mesh))}

    @property
    def _lengths(self) -> tuple[int, int, int]:
        """(prompt, response of the data, response of a policy), tokens."""
        limits = self.config.data.limits
        return limits.max_prompt_length, limits.max_response_length, self.config.ppo.response_length

    # Training on texts and pairs.

    def sft(self) -> Phase:
        section, (L, T, _) = self.config.sft, self._lengths
        steps = self.counts.sft_steps
        optimizer, step = sft_trainer(self._models[0], section, max(steps or 1, 1), self.mesh)
        state = jax.eval_shape(lambda p: init_state(p, optimizer), self.policy)
        batch = texts(section.batch_size, L, T)
        held = {"policy": state.params, "optimizer": state.opt_state}
        knobs = ("sft.gradient_accumulation_steps", "sft.batch_size", "model.remat", "mesh.fsdp")
        tokens = section.batch_size * (L + T)
        return Phase("SFT", "step", step, (state, batch), held, batch, steps, tokens, self._layers, knobs, learned=state.params)

    @property
    def _layers(self) -> int:
        return self.subjects.base.num_layers

    def pairs_width(self) -> int:
        """Response tokens of a training pair."""
        _, T, response = self._lengths
        return response if self.config.pairs.source == "sample" else T

    def reward(self, fits: int) -> Iterator[Phase]:
        """The step, and the pass that scores references and held-out pairs while the training state is still there."""
        section, (L, T, _), steps = self.config.reward, self._lengths, self.counts.reward_steps
        members = section.ensemble_size if self.counts.rounds[0].ensemble else 1
        loss = reward_loss(section, plugin)
        model, params = self._models[1], self.scalar
        optimizer, step = reward_trainer(model, loss, section, max(steps or 1, 1), self.mesh)
        state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
        held = {"reward": state.params, "optimizer": state.opt_state}
        batch = pairs(section.batch_size, L, self.pairs_width(), loss.columns)
        calls = None if steps is None else steps * fits * members
        knobs = ("reward.gradient_accumulation_steps", "reward.batch_size", "model.remat", "mesh.fsdp")
        tokens = 2 * section.batch_size * (L + self.pairs_width())
        yield Phase("reward", "step", step, (state, batch), held, batch, calls, tokens, self._layers, knobs, learned=state.params)
        calls = self.counts.passes(self.counts.reference_rows, section.eval_batch_size, 1)
        calls = None if calls is None else calls * fits * members
        yield self.scoring("reward", "scores of references", params, T, section.eval_batch_size, held, calls, "reward.eval_batch_size")

    def scoring(
        self, stage: str, name: str, params: Params, width: int, batch_size: int, held: dict[str, Any], calls: int | None, knob: str
    ) -> Phase:
        """The scalar head on (prompt, response of `width`)."""
        L, rows = self._lengths[0], sharding.rows_at_once(batch_size, batch_size, self.mesh)
        batch = texts(rows, L, width)
        sides = (batch.prompt_BL, batch.prompt_mask_BL, batch.response_BT, batch.response_mask_BT)
        function = score_pass(self._models[1], self.mesh)
        return Phase(
            stage, name, function, (params, sides, NUMBER), held, sides, calls, rows * (L + width), self._layers, (knob, "mesh.fsdp")
        )

    # Sampling, gold and log-probs of stored text.

    def sampling(
        self, stage: str, batch_size: int, held: dict[str, Any], prompts: int | None, *, samples: int = 2, new_tokens: int | None = None,
        name: str = "sample", **how: Any,
    ) -> Iterator[Phase]:  # fmt: skip
        """Responses of the policy to so many prompts; gold is in memory where it will score them."""
        L, rows = self._lengths[0], sharding.rows_at_once(batch_size if prompts is None else prompts, batch_size, self.mesh)
        calls = self.counts.passes(prompts, rows, samples)
        knobs = (f"{how.pop('knob', stage)}.batch_size", "mesh.fsdp")
        yield self._sample(stage, name, rows, L, new_tokens or self._lengths[2], held | self.gold_held, calls, knobs, **how)

    def _sample(
        self, stage: str, name: str, rows: int, L: int, T: int, held: dict[str, Any], calls: int | None, knobs: tuple[str, ...], *,
        greedy: bool = False, top_k: int = 0, top_p: float = 1.0, passes: int = 1,
    ) -> Phase:  # fmt: skip
        model, subjects = self._models[0], self.subjects
        function = sampler(
            model, self.mesh, max_new_tokens=T, eos_ids=subjects.eos_ids, pad_id=subjects.pad_id, greedy=greedy, top_k=top_k, top_p=top_p,
            vocab_size=subjects.vocab_size, passes=passes,
        )  # fmt: skip
        batch = (ints(rows, L), bools(rows, L), ints(rows))
        arguments = (held["policy"], batch, KEY, NUMBER)
        # The first token comes from the prompt's own pass.
        return Phase(stage, name, function, arguments, held, batch, calls, rows * T, self._layers, knobs, loop=max(T - 1, 1))

    def gold(self, stage: str, held: dict[str, Any], prompts: int | None, *, samples: int = 2) -> Iterator[Phase]:
        """The gold model on what was sampled, with its own lengths and batches."""
        gold, section = self.subjects.gold, self.config.gold
        if gold is None:
            return
        limits, rows = gold_limits(self.config, gold), sharding.rows_at_once(section.batch_size, section.batch_size, self.mesh)
        L, T = limits.max_prompt_length, limits.max_response_length
        batch = texts(rows, L, T)
        sides = (batch.prompt_BL, batch.prompt_mask_BL, batch.response_BT, batch.response_mask_BT)
        model = gold_model(self.config, gold, self.mesh)
        held = held | self.gold_held
        calls = self.counts.passes(prompts, rows, samples)
        yield Phase(
            stage, "gold scores", score_pass(model, self.mesh), (held["gold"], sides, NUMBER), held, sides, calls, rows * (L + T),
            gold.num_layers, ("gold.batch_size", "mesh.fsdp"),
        )  # fmt: skip

    def logprobs(
        self, stage: str, name: str, batch_size: int, width: int, temperature: float, held: dict[str, Any], calls: int | None, knob: str
    ) -> Phase:
        L, rows = self._lengths[0], sharding.rows_at_once(batch_size, batch_size, self.mesh)
        batch = texts(rows, L, width)
        function = logp_pass(self._models[0], temperature, self.mesh)
        knobs = (knob, "mesh.fsdp")
        return Phase(stage, name, function, (held["policy"], batch), held, batch, calls, rows * (L + width), self._layers, knobs)

    def update(self, round: Round) -> Iterator[Phase]:
        """What a reward update of the package computes on the devices; three models are loaded for it. Users' own are not known here."""
        config, counts = self.config, self.counts
        sections = SECTIONS_READ.get(round.reward_update or "", ())
        held = {"policy": self.policy, "π_SFT": self.policy, "reward": self.scalar}
        updates = sum(one.reward_update is not None for one in counts.rounds)
        if "weights" in sections:
            w = config.weights
            width = min(self.pairs_width(), w.max_tokens or self.pairs_width())
            calls = counts.passes(counts.pairs, w.batch_size, 2 * (updates + 1))  # once under π_SFT
            yield self.logprobs("update", "log-probs of pairs", w.batch_size, width, w.temperature, held, calls, "weights.batch_size")
        if "filter" in sections or "synthesize" in sections:
            own = "filter" if "filter" in sections else "synthesize"
            s = config.filter if own == "filter" else config.synthesize
            prompts = counts.pairs if own == "filter" and config.filter.compare == "own" else s.num_prompts
            how: dict[str, Any] = {"samples": updates if own == "filter" else updates * config.synthesize.num_samples, "knob": own}
            if own == "filter":
                f = config.filter
                how |= {"new_tokens": f.max_new_tokens, "greedy": f.temperature == 0, "top_k": f.top_k, "top_p": f.top_p}
            for one in self.sampling("update", s.batch_size, held, prompts, **how):
                yield replace(one, held=held)  # gold is not asked
        if "encoder" in sections and self.subjects.encoder is not None:
            yield self._encoder(held, updates)

    def _encoder(self, held: dict[str, Any], updates: int) -> Phase:
        """The Flax encoder on a batch of the longest texts."""
        encoder, rows = self.subjects.encoder, self.config.encoder.batch_size
        assert encoder is not None
        rows, width = sharding.rows_at_once(rows, rows, self.mesh), self.config.encoder.max_length or encoder.max_length
        bert = build_bert(encoder)
        params, batch = jax.eval_shape(bert.init, KEY), (ints(rows, width), bools(rows, width))
        calls = self.counts.passes(self.counts.pairs, rows, 2 + updates)
        held = held | {"encoder": params}
        function = sharding.rows(lambda p, b: bert.encode(p, *b), self.mesh)
        return Phase("update", "sentence vectors", function, (params, batch), held, batch, calls, rows * width, 0, ("encoder.batch_size",))

    # Policies.

    def policies(self) -> Iterator[Phase]:
        """The programs of the policy's rounds: of every kind of round that differs in the models it holds."""
        kinds: dict[bool, list[Round]] = {}
        for one in self.counts.rounds:
            kinds.setdefault(one.reference != 0, []).append(one)
        for moved, rounds in kinds.items():
            first = rounds[0].number
            suffix = "" if len(kinds) == 1 else " (round 1)" if not moved else f" (from round {first} on)"
            make = self.preference if rounds[0].policy_update in PREFERENCE else self.rollouts
            yield from make(rounds[0], moved, len(rounds), suffix)

    def rollouts(self, round: Round, moved: bool, times: int, suffix: str) -> Iterator[Phase]:
        """Sample, score and update of PPO or RLOO; state and frozen models are there throughout."""
        config, section, way = self.config, self.config.ppo, POLICY_UPDATES[round.policy_update]
        L, _, T = self._lengths
        B, (policy, scalar) = section.batch_size, self._models
        spread_coef = spread_of(round.ensemble, config)
        trainer = way.trainer(
            policy, scalar, as_compiled(section), plugin, eos_ids=self.subjects.eos_ids, pad_id=self.subjects.pad_id,
            vocab_size=self.subjects.vocab_size, spread_coef=spread_coef, mesh=self.mesh,
        )  # fmt: skip
        learned, rest = self.halves()
        params, controller = {"policy": learned}, {"kl_coef": NUMBER}
        if way.critic:
            params, controller = params | {"critic": self.scalar}, controller | {"value_bias": NUMBER}
        members = 1 if spread_coef is None else config.reward.ensemble_size
        reward, bias = (self.scalar, BIAS) if spread_coef is None else ((self.scalar,) * members, (BIAS,) * members)
        frozen = {"reference": self.policy, "reward": reward} | ({"sft": self.policy} if moved else {})
        state = jax.eval_shape(lambda p, c: init_state(p, trainer.optimizer, c), params, controller)
        base = None if rest is None else {"policy": rest}
        models, shown = joined(state.params, base), {"reference": "reference", "reward": "reward", "sft": "π_SFT"}
        others = {shown[name]: tree for name, tree in frozen.items()}
        if rest is not None and round.reference == round.policy_start:
            del others["reference"]  # the base under the adapters is the reference
        held = {**models, "optimizer": state.opt_state}
        reading = held | others
        if config.model.offload_frozen:  # on the device in their turn: the largest counts
            name = max(others, key=lambda one: bytes_on_device(others[one], self.mesh))
            reading = held | {f"{name} in its turn": others[name]}
        else:
            held = reading
        calls, tokens, layers = self.counts.ppo_updates * times, B * T, self._layers
        knobs = ("ppo.generation_batch_size", "model.offload_frozen", "mesh.fsdp")  # another ppo.batch_size would be another training
        how = {"top_k": section.top_k, "top_p": section.top_p, "passes": passes_of(section)}
        yield replace(self._sample("policy", f"sample{suffix}", B, L, T, held, calls, knobs, **how), held=held)
        prompts = PromptBatch(ints(B, L), bools(B, L), bools(B), ints(B))
        batch = (prompts, Completion(ints(B, T), bools(B, T), floats(B, T)))
        knobs = ("ppo.forward_batch_size", "model.offload_frozen", "mesh.fsdp")
        arguments = ({**models, **frozen}, batch, controller, bias)
        yield Phase("policy", f"score{suffix}", trainer.score, arguments, reading, batch, calls, tokens, layers, knobs)
        rollout = Rollout(
            prompts.prompt_BL, prompts.prompt_mask_BL, ints(B, T), bools(B, T), bools(B, T), floats(B, T), floats(B, T), floats(B, T),
            floats(B, T), floats(B, T), floats(B), bools(B),
        )  # fmt: skip
        knobs = ("ppo.gradient_accumulation_steps", "model.remat", "lora.r", "model.offload_frozen", "mesh.fsdp")
        arguments = (state, rollout, KEY, *(() if base is None else (base,)))
        yield Phase(
            "policy", f"update{suffix}", trainer.update, arguments, held, rollout, calls, tokens, layers, knobs, learned=state.params
        )

    def preference(self, round: Round, moved: bool, times: int, suffix: str) -> Iterator[Phase]:
        """Log-probs of the reference, and the steps of DPO or WPO."""
        section, (L, _, _), steps, width = self.config.dpo, self._lengths, self.counts.dpo_steps, self.pairs_width()
        loss = preference_loss(section, round.policy_update, plugin)
        if needs_reference(loss):
            held = {"policy": self.policy} | ({"reference": self.policy} if round.reference != round.policy_start else {})
            calls = self.counts.passes(self.counts.pairs, section.eval_batch_size, 2 * times)
            name = f"log-probs of pairs{suffix}"
            yield self.logprobs("policy", name, section.eval_batch_size, width, 1.0, held, calls, "dpo.eval_batch_size")
        optimizer, step = preference_trainer(self._models[0], loss, section, max(steps or 1, 1), self.mesh)
        learned, rest = self.halves()
        state = jax.eval_shape(lambda p: init_state(p, optimizer), learned)
        columns = (*loss.columns, *(REFERENCE if needs_reference(loss) else ()))
        batch = pairs(section.batch_size, L, width, tuple(dict.fromkeys(columns)))
        held = {"policy": joined(state.params, rest), "optimizer": state.opt_state}
        arguments = (state, batch, *(() if rest is None else (rest,)))
        knobs = ("dpo.gradient_accumulation_steps", "dpo.batch_size", "model.remat", "lora.r", "mesh.fsdp")
        calls, tokens = None if steps is None else steps * times, 2 * section.batch_size * (L + width)
        yield Phase("policy", f"step{suffix}", step, arguments, held, batch, calls, tokens, self._layers, knobs, learned=state.params)

    def evaluation(self) -> Iterator[Phase]:
        """At the end of every round and after SFT: two responses a prompt, gold, log-probs under policy and π_SFT, the reward model."""
        config, counts, section = self.config, self.counts, self.config.evaluation
        rounds, prompts, T = len(counts.rounds), counts.evaluation_prompts, self._lengths[2]
        rows = section.batch_size if prompts is None else min(section.batch_size, prompts)
        held = {"policy": self.policy}
        how = {"samples": 2 * (rounds + 1), "greedy": section.temperature == 0}
        yield from self.sampling("evaluation", section.batch_size, held, prompts, **how)
        yield from self.gold("evaluation", held, prompts, samples=3 * (rounds + 1))
        held = held | self.gold_held
        calls = counts.passes(prompts, rows, 2 * rounds)
        logprobs = held | {"π_SFT": self.policy}
        temperature = section.temperature or 1.0
        yield self.logprobs("evaluation", "log-probs", rows, T, temperature, logprobs, calls, "evaluation.batch_size")
        if any(one.fits_reward for one in counts.rounds):
            members = config.reward.ensemble_size if counts.rounds[0].ensemble else 1
            calls = counts.passes(prompts, config.reward.eval_batch_size, 3 * rounds * members)
            size = config.reward.eval_batch_size if prompts is None else min(config.reward.eval_batch_size, prompts)
            scored = held | {"reward": self.scalar}
            yield self.scoring("evaluation", "reward scores", self.scalar, T, size, scored, calls, "reward.eval_batch_size")
