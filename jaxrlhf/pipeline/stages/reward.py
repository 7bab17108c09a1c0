"""The reward model of a round."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf import rng, sharding
from jaxrlhf.algorithms.reward import called, held_out_pairs, pair_trainer, reward_loss, score_pairs, with_columns, with_weights
from jaxrlhf.algorithms.rounds import Round
from jaxrlhf.algorithms.training import num_steps, own_copy, train
from jaxrlhf.data.tokens import eos_ids_of, tokenize_demonstrations
from jaxrlhf.evaluation.diagnostics import VALID_SCORES, pair_accuracy
from jaxrlhf.models.hub import with_reward_bias
from jaxrlhf.pipeline import inputs
from jaxrlhf.pipeline.stages.context import RunContext, add_model, epochs, placed
from jaxrlhf.pipeline.stages.lineage import reward_lineage, write_lineage
from jaxrlhf.pipeline.stages.pairs import valid_pairs
from jaxrlhf.pipeline.stages.reward_update import updated_pairs
from jaxrlhf.plugins import plugin, source_of
from jaxrlhf.scorers.reward_model import score_responses
from jaxrlhf.steps.state import init_state
from jaxrlhf.storage.stage import Done, Stage
from jaxrlhf.types import TextBatch, TrainState

OF_ENSEMBLES = ("ensemble_size", "spread_coef")  # of config.reward, but nothing that one reward model depends on


def reward_stage(
    run: RunContext, round: Round, sft: Done, previous: Done | None, pairs: Done, update: Done | None, *, member: int = 0
) -> Done:
    """The reward model of a round: Bradley–Terry on the (weighted) pairs, then the bias that puts reference responses at 0.

    Its scores of the held-out pairs, bias taken off, stay in the folder (float32 [2, M], chosen and rejected): what drift is told by.
    `member` numbers the models of an ensemble: each has its own new head and its own order of the pairs; 0 is the model of a run without.
    """
    config = run.config
    continues = previous is not None and round.reward_start == "previous"
    start = previous if previous is not None and continues else sft
    of_member = f"/{member}" if member else ""

    def build(folder: Path) -> dict[str, Any]:
        key = rng.stream(run.key, f"reward/head{of_member}", round.number)
        base = run.load(start, head="scalar", key=None if continues else key)
        loss = reward_loss(config.reward, plugin)
        fitted, weights_N = updated_pairs(update, pairs)
        given = {"start": start, "sft": sft, "pairs": pairs, "update": update, "fitted": fitted, "weights_N": weights_N}
        write_lineage(folder, reward_lineage(round, **given))
        table = with_columns(with_weights(fitted.tokens, weights_N), loss, name=called(config.reward), updated=update is not None)
        valid = valid_pairs(pairs)
        n, section = len(table.index_B), config.reward
        steps = num_steps(n, section)
        optimizer, step = pair_trainer(base.model, loss, section, max(steps, 1), run.mesh)
        state = sharding.place(init_state(own_copy(base.params), optimizer), run.mesh)
        base = base._replace(params=None)

        fed = epochs(run, table, fitted.ids, section.batch_size, steps, seed=config.seed, name=f"reward{of_member}/r{round.number}")

        def loop(state: TrainState, rows: Iterator) -> Iterator:
            return train(step, state, placed(run, rows))

        tokens = 2 * section.batch_size * (table.prompt_BL.shape[1] + table.chosen_BT.shape[1])
        watched = held_out_pairs(base.model, loss, called(section), valid, section, run.mesh)
        state = run.train(folder, "reward", state, loop, fed, steps=steps, tokens=tokens, round=round.number, held_out=watched)
        options = {"batch_size": section.eval_batch_size, "mesh": run.mesh, "blocks": run.blocks.of("final scores")}
        references = reference_responses(run, base.tokenizer)
        bias = float(score_responses(base.model, state.params, references, **options).mean())
        add_model(with_reward_bias(base._replace(params=state.params), bias), folder)
        scores = score_pairs(base.model, state.params, valid, **options)
        np.save(folder / VALID_SCORES, np.stack(scores).astype(np.float32) - np.float32(bias), allow_pickle=False)
        accuracy = pair_accuracy(*scores)
        return {"steps": steps, "kept_step": int(state.step), "pairs": n, "reward_bias": bias, "accuracy_valid": accuracy}

    slice_ = {
        "reward": {k: v for k, v in asdict(config.reward).items() if k not in OF_ENSEMBLES} | {"plugin": source_of(config.reward.loss)},
        "round": round.number,
        "seed": config.seed,
        "start": round.reward_start,
        "data": inputs.data_identity(config),
        "limits": asdict(config.data.limits),
        "bucket": config.data.bucket,
        "dtype": config.model.dtype,
    }
    slice_ |= {"member": member} if member else {}
    sources = {"previous" if continues else "sft": start, "pairs": pairs} | ({} if update is None else {"update": update})
    name = f"r{round.number}-reward" + (f"-{member + 1}" if member else "")
    stage = Stage(name, "model", "reward", slice_, sources, version=3, parent=next(iter(sources)))
    return run.build(stage, build, round=round.number)


def reference_responses(run: RunContext, tokenizer: Any) -> TextBatch:
    """The responses whose mean score is 0 by definition: the demonstrations, as many as `reward.num_reference_rows`."""
    rows, _ = inputs.demonstrations_of(run.config, tokenizer)
    limit = run.config.reward.num_reference_rows
    table, _ = tokenize_demonstrations(rows[:limit], tokenizer, inputs.limits_of(run.config), eos_ids=eos_ids_of(tokenizer))
    return table
