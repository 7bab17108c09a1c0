"""What a run reads: its rows, their identity by content, the gold reward, and checks before anything is built."""

from jaxrlhf.pipeline.inputs.checks import check, check_model
from jaxrlhf.pipeline.inputs.gold import gold_limits, gold_of, scored_by_leader, try_gold
from jaxrlhf.pipeline.inputs.identity import OF_MEMORY, data_identity, gold_identity, model_identity, tokenizer_identity
from jaxrlhf.pipeline.inputs.rows import (
    TOY,
    demonstrations_of,
    evaluation_prompts_of,
    held_out_of,
    limits_of,
    pairs_of,
    prompts_of,
    valid_prompts_of,
    without_held_out,
)

__all__ = [
    "OF_MEMORY",
    "TOY",
    "check",
    "check_model",
    "data_identity",
    "demonstrations_of",
    "evaluation_prompts_of",
    "gold_identity",
    "gold_limits",
    "gold_of",
    "held_out_of",
    "limits_of",
    "model_identity",
    "pairs_of",
    "prompts_of",
    "scored_by_leader",
    "tokenizer_identity",
    "try_gold",
    "valid_prompts_of",
    "without_held_out",
]
