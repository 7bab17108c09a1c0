"""How often a run does what: its rounds, and rows where config or user say how many there are."""

from dataclasses import dataclass

from jaxrlhf.algorithms.ppo import num_updates
from jaxrlhf.algorithms.rounds import Round, method_of, num_rounds, round_of
from jaxrlhf.algorithms.training import num_steps
from jaxrlhf.config import Config, SupervisedConfig
from jaxrlhf.pipeline import inputs
from jaxrlhf.plugins import plugin


@dataclass(frozen=True)
class Counts:
    """Numbers of a whole run; None where neither the config nor the user says how many rows the data have."""

    rounds: tuple[Round, ...]
    sft_steps: int | None
    reward_steps: int | None
    dpo_steps: int | None
    ppo_updates: int  # of one round
    pairs: int | None  # training pairs
    pairs_sampled: int | None  # prompts that are answered twice for them, held-out ones included
    reference_rows: int | None  # responses a reward model's bias is taken from
    evaluation_prompts: int | None

    @staticmethod
    def passes(rows: int | None, batch_size: int, times: int) -> int | None:
        """Batches of `times` passes over so many rows."""
        return None if rows is None else times * -(-rows // batch_size)


def counts_of(config: Config, *, rows: int | None = None, valid_rows: int | None = None) -> Counts:
    """What the config says, and for data from files `rows` (of data.train) and `valid_rows` (held out). Every refit is taken to be due."""
    method = method_of(config.method, config.row, plugin)
    rounds: list[Round] = []
    for number in range(1, num_rounds(method, config.rounds) + 1):
        updated = any(one.reward_update is not None for one in rounds)
        rounds.append(round_of(method, number, rounds[-1] if rounds else None, updated=updated))
    own = config.data.train == inputs.TOY
    sampled = config.pairs.source == "sample"
    trained = config.data.num_demonstrations if own else rows
    pairs = config.pairs.num_pairs if sampled else _least(rows, config.data.max_pairs)
    asked = config.evaluation.num_prompts
    evaluated = asked if own else _least(valid_rows, asked) if valid_rows is not None or asked <= 10_000 else None
    return Counts(
        rounds=tuple(rounds),
        sft_steps=_steps(trained, config.sft),
        reward_steps=_steps(pairs, config.reward),
        dpo_steps=_steps(pairs, config.dpo),
        ppo_updates=num_updates(config.ppo),
        pairs=pairs,
        pairs_sampled=config.pairs.num_pairs + config.pairs.num_valid if sampled else None,
        reference_rows=_least(trained, config.reward.num_reference_rows),
        evaluation_prompts=evaluated,
    )


def _least(rows: int | None, limit: int | None) -> int | None:
    """The smaller of what is known."""
    known = [value for value in (rows, limit) if value is not None]
    return min(known) if known else None


def _steps(rows: int | None, section: SupervisedConfig) -> int | None:
    return section.max_steps if rows is None else num_steps(rows, section)
