"""The stage of the policies that learn from pairs directly: DPO, IPO, WPO."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxrlhf import rng, sharding
from jaxrlhf.algorithms.preference import REFERENCE, needs_reference, preference_loss, settings_read
from jaxrlhf.algorithms.reward import held_out_pairs, pair_trainer, with_columns, with_weights
from jaxrlhf.algorithms.reward_update import Pairs
from jaxrlhf.algorithms.rounds import Round
from jaxrlhf.algorithms.training import num_steps, own_copy, train
from jaxrlhf.data.tables import read_pair_table
from jaxrlhf.models.hub import Loaded
from jaxrlhf.offline.logprobs import stored_pair_logps
from jaxrlhf.pipeline.stages.context import RoundInputs, RunContext, add_model, epochs, placed
from jaxrlhf.pipeline.stages.fixed_models import lora_slice, split_params
from jaxrlhf.pipeline.stages.lineage import policy_lineage, write_lineage
from jaxrlhf.pipeline.stages.pairs import VALID
from jaxrlhf.pipeline.stages.reward_update import updated_pairs
from jaxrlhf.plugins import plugin, source_of
from jaxrlhf.steps.state import init_state, joined
from jaxrlhf.storage.stage import Done, Stage
from jaxrlhf.types import PairBatch, TrainState

TEMPERATURE = 1.0  # of the log-probs on both sides of the ratio: the pair step scores the policy at 1


def preference_stage(run: RunContext, round: Round, given: RoundInputs) -> Done:
    """The policy of a round, trained from `given.start` on the (filtered, weighted) pairs, against the reference where the loss reads one.

    Every round has a fresh optimizer. π_SFT, which other policy updates measure their distance to, is only named.
    """
    start, reference, pairs, update = given.start, given.reference, given.pairs, given.update
    config, section, number = run.config, run.config.dpo, round.number
    loss = preference_loss(section, round.policy_update, plugin)

    def build(folder: Path) -> dict[str, Any]:
        policy = run.load(start, head="lm")
        fitted, weights_N = updated_pairs(update, pairs)
        write_lineage(folder, policy_lineage(round, given, refers=needs_reference(loss)))
        table, n = with_weights(fitted.tokens, weights_N), len(fitted.rows)
        steps = num_steps(n, section)
        held = Pairs(*read_pair_table(pairs.folder / VALID))
        valid = held.tokens
        if needs_reference(loss):
            reference_model = (lambda: policy) if reference.hash == start.hash else (lambda: run.load(reference, head="lm"))
            how = (reference_model, reference.hash, policy.tokenizer)
            table = with_reference(run, number, fitted, table, *how)
            valid = with_reference(run, number, held, valid, *how) if section.eval_steps and len(held.rows) else valid
        name = f"dpo.loss {section.loss!r}"
        table = with_columns(table, loss, name=name, updated=update is not None)
        optimizer, step = pair_trainer(policy.model, loss, section, max(steps, 1), run.mesh)
        trainable, frozen = split_params(run, policy, rng.stream(rng.stream(run.key, "policy", number), "adapters"))
        state = sharding.place(init_state(own_copy(trainable), optimizer), run.mesh)
        policy, trainable = policy._replace(params=None), None  # the memory is wanted for the training
        base = () if frozen is None else (frozen,)

        fed = epochs(run, table, fitted.ids, section.batch_size, steps, seed=config.seed, name=f"preference/r{number}")
        tokens = 2 * section.batch_size * (table.prompt_BL.shape[1] + table.chosen_BT.shape[1])
        watched = held_out_pairs(policy.model, loss, name, valid, section, run.mesh, *base)

        def loop(state: TrainState, rows: Iterator[PairBatch]) -> Iterator:
            return train(step, state, placed(run, rows), *base)

        state = run.train(folder, "policy", state, loop, fed, steps=steps, tokens=tokens, round=number, held_out=watched)
        add_model(policy._replace(params=joined(state.params, frozen)), folder)
        return {"steps": steps, "kept_step": int(state.step), "pairs": n}

    slice_ = {
        "dpo": settings_read(section, round.policy_update, loss)
        | {"plugin": source_of(section.loss) if round.policy_update == "dpo" else None},
        "round": number,
        "seed": config.seed,
        "bucket": config.data.bucket,
        "dtype": config.model.dtype,
        **lora_slice(config),
    }
    sources = {"start": start, "pairs": pairs}
    sources |= {"reference": reference} if needs_reference(loss) else {}
    sources |= {} if update is None else {"update": update}
    stage = Stage(f"r{number}-policy", "model", round.policy_update, slice_, sources, version=2, parent="start")
    return run.build(stage, build, round=number)


def with_reference(
    run: RunContext, number: int, pairs: Pairs, table: PairBatch, reference: Callable[[], Loaded], model_hash: str, tokenizer: Any
) -> PairBatch:
    """The table with the reference's log-probs of both sides as columns: computed once for a set of pairs, whichever arm comes first."""
    config = run.config
    logps = stored_pair_logps(
        run.columns,
        *pairs,
        reference,
        model_hash=model_hash,
        tokenizer=tokenizer,
        limits=config.data.limits,
        temperature=TEMPERATURE,
        batch_size=config.dpo.eval_batch_size,
        mesh=run.mesh,
        **run.kept("log-probs under the reference", round=number),
    )
    return replace(table, columns={**table.columns, **{name: logps[logp] for name, logp in REFERENCE.items()}})
