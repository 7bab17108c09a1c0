"""Hugging Face folder ↔ (model, parameters, tokenizer, config): safetensors only, in both directions."""

from jaxrlhf.models.hub.load import FILES, check_weights, classes_of, initialise, load, read_config, rehead, resolve, tokenizer_named
from jaxrlhf.models.hub.loaded import Loaded, eos_ids, head_of, reward_bias, with_reward_bias
from jaxrlhf.models.hub.save import PAD_TOKEN, save
from jaxrlhf.models.hub.tokenizer import check_vocabulary, read_tokenizer, save_tokenizer, with_tokenizer

__all__ = [
    "FILES", "PAD_TOKEN", "Loaded", "check_vocabulary", "check_weights", "classes_of", "eos_ids", "head_of", "initialise", "load",
    "read_config", "read_tokenizer", "rehead", "resolve", "reward_bias", "save", "save_tokenizer", "tokenizer_named", "with_reward_bias",
    "with_tokenizer",
]  # fmt: skip
