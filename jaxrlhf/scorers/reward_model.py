"""A reward-model folder as a scorer: ours, or any sequence-classification model whose architecture we load."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf import sharding
from jaxrlhf.config import DataConfig
from jaxrlhf.data.chat import around, render, special_strings
from jaxrlhf.data.tokens import Limits, eos_ids_of, retokenize_responses
from jaxrlhf.models import DecoderConfig
from jaxrlhf.models.hub import load, reward_bias
from jaxrlhf.rollouts.passes import over_batches
from jaxrlhf.scorers import Scorer
from jaxrlhf.steps.pair import response_scores
from jaxrlhf.storage.blocks import NOWHERE, Blocks
from jaxrlhf.types import Array, Model, Params, TextBatch


@lru_cache(maxsize=16)
def score_pass(model: Model, mesh: Any) -> sharding.Compiled:
    """`response_scores` compiled for the devices of `mesh`: (params, (prompt_BL, mask_BL, response_BT, mask_BT), bias) → scores [B]."""

    def score(params: Params, sides: tuple[Array, Array, Array, Array], bias: Array) -> Array:
        return response_scores(model, params, *sides, bias)

    return sharding.rows(score, mesh)


def score_responses(
    model: Model, params: Params, texts: TextBatch, *, batch_size: int, mesh: Any = None, bias: float = 0.0, **how: Any
) -> np.ndarray:
    """Scores of all N responses, in order, minus `bias`; float32 [N]. `how`: bucket, blocks and progress, as `over_batches` takes them."""
    if len(texts.index_B) == 0:
        return np.zeros(0, np.float32)
    score = score_pass(model, mesh)

    def read(batch: TextBatch) -> tuple[Array]:
        sides = (batch.prompt_BL, batch.prompt_mask_BL, batch.response_BT, batch.response_mask_BT)
        return (score(params, sides, np.float32(bias)),)

    return over_batches(read, texts, batch_size, mesh=mesh, **how)[0]


def reward_model_scorer(
    source: str, *, batch_size: int, limits: Limits, dtype: str = "float32", template_date: str = DataConfig.template_date, mesh: Any = None
) -> Scorer:
    """The model in `source` as a scorer of text: its own tokenizer, its chat template where it has one, its `reward_bias` subtracted.

    With a template, a prompt becomes one user turn, unless it came out of that very template already (`Frame.wrote`). A conversation that
    another template rendered cannot be told from text: it becomes one user turn, its control tokens spelled out. `template_date`: what a
    template that asks for the date is given.
    Prompts and responses over `limits` are cut (prompts on the left), because a scorer must answer for every row.
    """
    loaded = load(source, head="scalar", dtype=dtype, mesh=mesh)
    tokenizer, bias = loaded.tokenizer, reward_bias(loaded)
    chat = bool(getattr(tokenizer, "chat_template", None))
    frame = frame_of(tokenizer, template_date) if chat else None

    def score(prompts: Sequence[str], responses: Sequence[str], /, blocks: Blocks = NOWHERE) -> np.ndarray:
        heads, bodies = list(prompts), list(responses)
        if frame is not None:
            pairs = [_turn(tokenizer, frame, template_date, *row) for row in zip(heads, bodies, strict=True)]
            heads, bodies = [head for head, _ in pairs], [body for _, body in pairs]
        texts, _ = retokenize_responses(heads, bodies, tokenizer, limits, eos_ids=eos_ids_of(tokenizer), templated=chat)
        how = {"batch_size": batch_size, "mesh": mesh, "bucket": 64, "blocks": blocks}
        scores = score_responses(loaded.model, loaded.params, texts, bias=bias, **how)
        if (bad := np.flatnonzero(~np.isfinite(scores))).size:
            text = responses[bad[0]][:80]
            raise ValueError(
                f"{source} scores response {bad[0]} ({text!r}) {scores[bad[0]]}, and {bad.size} of {len(scores)} are not finite."
            )
        return scores

    return score


def limits_within(model: DecoderConfig, prompt: int, response: int, *, times: int = 1) -> Limits:
    """Limits at which text is cut: `times` the tokens of a prompt and of a response, less where the model has learned fewer positions. A
    text of no more than `prompt` and `response` tokens is whole, unless a table of positions has no room for it."""
    most = model.longest_text if model.positions == "learned" else max(model.longest_text, prompt + response)
    longest = min(times * response, most - prompt if prompt + response <= most else most // 2)
    return Limits(min(times * prompt, most - longest), longest, "truncate", "truncate")


class Frame(NamedTuple):
    """What a chat template puts before a user's words (its first control token, or else all of it) and what asks for the reply."""

    start: str
    end: str

    def wrote(self, prompt: str) -> bool:
        """Whether the template rendered `prompt`. Data in which a message spells a control token is refused where it is read."""
        return bool(self.end.strip()) and prompt.startswith(self.start) and prompt.endswith(self.end)


def frame_of(tokenizer: Any, date: str = DataConfig.template_date) -> Frame:
    before, after = around(tokenizer, [{"role": "user"}], {"template_date": date}, add_generation_prompt=True)
    return Frame(next((token for token in special_strings(tokenizer) if before.startswith(token)), before), after)


def _turn(tokenizer: Any, frame: Frame, date: str, prompt: str, response: str) -> tuple[str, str]:
    """(prompt, response) as the tokenizer's chat template writes them."""
    if frame.wrote(prompt):
        return prompt, response
    turns = {"role": "user", "content": prompt}, {"role": "assistant", "content": response}
    head, text = render(tokenizer, [turns[0]], [turns[1]], template_date=date)
    return head, text
