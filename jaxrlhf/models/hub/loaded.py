"""A model in use, and what its config says of it."""

from dataclasses import replace
from typing import Any, NamedTuple

from jaxrlhf.data.chat import chat_end_id
from jaxrlhf.models.transformer import DecoderConfig
from jaxrlhf.types import Model, Params


class Loaded(NamedTuple):
    """A model in use: its functions, parameters, tokenizer (None where the folder has none) and config."""

    model: Model
    params: Params
    tokenizer: Any
    config: DecoderConfig


def head_of(params: Params) -> str:
    """ "scalar" or "lm", from the shape of the parameters."""
    return "scalar" if "head" in params and params["head"]["kernel"].shape[-1] == 1 else "lm"


def eos_ids(loaded: Loaded) -> tuple[int, ...]:
    """Every id that ends a response: of generation_config.json, config.json, the tokenizer and its chat template, in this order, each once.

    Whatever ends a response in the data (`data.chat.eos_ids_of`) is among them, so that a sampler stops where training said stop. A base
    model may know its chat template's end token from there alone.
    """
    tokenizer = loaded.tokenizer
    of_tokenizer = () if tokenizer is None else (tokenizer.eos_token_id, chat_end_id(tokenizer))
    return tuple(dict.fromkeys([*stated_eos_ids(loaded.config), *(i for i in of_tokenizer if i is not None)]))


def stated_eos_ids(config: DecoderConfig) -> list[int]:
    """The EOS ids of generation_config.json, then of config.json: each one number, several or none."""
    given = (config.generation.get("eos_token_id"), config.hf.get("eos_token_id"))
    return [i for value in given if value is not None for i in (value if isinstance(value, list | tuple) else [value])]


def reward_bias(loaded: Loaded) -> float:
    """The mean score of reference responses: score = scalar − reward_bias. 0 where none was set."""
    return float(loaded.config.hf.get("reward_bias", 0.0))


def with_reward_bias(loaded: Loaded, bias: float) -> Loaded:
    return loaded._replace(config=replace(loaded.config, hf={**loaded.config.hf, "reward_bias": float(bias)}))
