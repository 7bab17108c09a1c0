"""Decoders by config, their heads, and Hugging Face folders in both directions. Flax lives here and nowhere else."""

from jaxrlhf.models.families import config_from_hf, config_from_shape
from jaxrlhf.models.heads import with_head
from jaxrlhf.models.hub import (
    Loaded,
    eos_ids,
    head_of,
    initialise,
    load,
    read_tokenizer,
    reward_bias,
    save,
    with_reward_bias,
    with_tokenizer,
)
from jaxrlhf.models.model import build_model
from jaxrlhf.models.transformer import Cache, DecoderConfig

__all__ = [
    "Cache",
    "DecoderConfig",
    "Loaded",
    "build_model",
    "config_from_hf",
    "config_from_shape",
    "eos_ids",
    "head_of",
    "initialise",
    "load",
    "read_tokenizer",
    "reward_bias",
    "save",
    "with_head",
    "with_reward_bias",
    "with_tokenizer",
]
