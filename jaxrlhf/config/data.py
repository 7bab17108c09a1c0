"""Config of what a run reads: text, models, tokenizers, pairs and the gold reward."""

import math
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict

STRICT = ConfigDict(extra="forbid")  # pydantic would ignore unknown keys


@dataclass(frozen=True)
class ToyTask:
    """The built-in task. `overlong_penalty`, beyond `length_turn` words, is what makes a reward model stale.

    Gold rewards; every count is per response. A word is what stands between spaces: a full stop is a word, EOS is not.
    """

    __pydantic_config__ = STRICT

    length_turn: int = 8  # words up to which length is free; 8 = both facts' main words and two full stops
    overlong_penalty: float = 0.25  # reward lost: this × (words beyond length_turn)²
    main_reward: float = 0.7  # per subject, verb or object of either fact that the response contains (at most 6)
    detail_reward: float = 0.2  # per place or time of either fact that the response contains (at most 4)
    foreign_penalty: float = 0.5  # per word that is not in the post
    repeat_penalty: float = 0.4  # per occurrence of a word, full stops aside, after its first
    grammar_penalty: float = 0.25  # per step between neighbours that no sentence `S V O [P] [T] .` takes, both ends of the text included
    binding_penalty: float = 0.2  # per pair of neighbours that belong to different facts

    # Demonstrations: probabilities in [0, 1].
    demo_one_fact: float = 0.6  # tell one fact, not both
    demo_drop: float = 0.25  # leave out a main word (each)
    demo_keep_detail: float = 0.15  # keep a place or time (each)
    demo_invent: float = 0.03  # replace a told word by one of its class that is not in the post (each)
    demo_misbind: float = 0.03  # replace a told word by the other fact's (each)
    demo_repeat: float = 0.02  # say a told word twice (each)
    demo_filler: float = 0.02  # follow a told word by one of the post's filler words (each)
    demo_ramble: float = 0.03  # say the whole text twice: all that pairs can tell about lengths far beyond the turn

    max_words: int = 13  # longest demonstration in words (the rest is cut); with EOS one token more
    reference_facts: int = 1  # reference response: 1 = the first fact in full, a yardstick that can be beaten; 2 = both facts' main words

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if name.startswith("demo_") and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} {value} is not a probability; give a number in [0, 1].")
            if name.endswith(("_penalty", "_reward")) and not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} {value} must be finite and ≥ 0: penalties are subtracted, rewards added.")
        if self.demo_invent + self.demo_misbind > 1.0:
            raise ValueError(
                f"demo_invent {self.demo_invent} + demo_misbind {self.demo_misbind} exceed 1: a word is replaced once; lower one of them."
            )
        if self.length_turn < 0:
            raise ValueError(f"length_turn {self.length_turn} must be ≥ 0 words.")
        if self.max_words < 8:
            raise ValueError(f"max_words {self.max_words} must be ≥ 8: the reference responses have up to 8 words.")
        if self.reference_facts not in (1, 2):
            raise ValueError(f"reference_facts {self.reference_facts} must be 1 or 2: a post has two facts.")


@dataclass(frozen=True)
class LimitsConfig:
    """Lengths in tokens. A prompt over the limit is dropped (and listed) or cut on the left, a response cut or dropped."""

    __pydantic_config__ = STRICT

    max_prompt_length: int = 512
    max_response_length: int = 128
    long_prompt: Literal["drop", "truncate"] = "drop"
    long_response: Literal["drop", "truncate"] = "truncate"


Sources = str | tuple[str, ...]  # one or several of: a file, a pattern of files, a folder of shards, a hub id (org/name or org/name[split])


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from: JSONL(.gz) or Parquet files, hub ids, or `toy`, the task that the package generates."""

    __pydantic_config__ = STRICT

    train: Sources = "toy"  # preference pairs; with pairs.source: sample, rows with a prompt and its reference response
    valid: Sources | None = None  # held-out rows of the same kind; None: split off `train` by prompt
    valid_fraction: float = 0.05  # share of prompts held out when `valid` is None
    demonstrations: Sources | None = None  # SFT text; None: the chosen (or reference) responses of `train` (toy: its own)
    prompts: Sources | None = None  # PPO prompts; None: the prompts of `train`
    rename: dict[str, str] = field(default_factory=dict)  # column of the data → name the readers know: {query: prompt}
    num_demonstrations: int = 40_000  # toy only
    num_prompts: int = 20_000  # toy only
    max_pairs: int | None = None  # read at most this many training pairs
    on_bad_row: Literal["drop", "error"] = "drop"
    prompt_format: str = "{}"  # a template for bare instructions, "\n\nHuman: {}\n\nAssistant:"
    response_format: str = "{}"  # and for their responses, " {}"
    # How text pairs without a prompt are cut: after the last "\n\nAssistant:" that both sides share (HH-RLHF), or where they part (TRL).
    implicit_prompt: Literal["assistant", "common_prefix"] = "assistant"
    template_date: Annotated[str, BeforeValidator(str)] = "2024-07-26"  # today for a chat template that asks (strftime_now), ISO 8601
    bucket: int = 0  # the width of a batch is a multiple of this many tokens (few shapes, few compilations); 0: full width
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    toy: ToyTask = field(default_factory=ToyTask)

    def __post_init__(self) -> None:
        try:
            datetime.fromisoformat(self.template_date)
        except ValueError:
            raise ValueError(f"template_date {self.template_date!r} is no date; give one like {DataConfig.template_date}.") from None


@dataclass(frozen=True)
class ModelShape:
    """A model from scratch. None takes the family's usual value."""

    __pydantic_config__ = STRICT

    family: Literal["gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"] = "gpt_neox"
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int | None = None
    intermediate_size: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The base model: a Hugging Face folder or hub id (`source`), or a shape to initialise at random."""

    __pydantic_config__ = STRICT

    source: str | None = None
    shape: ModelShape = field(default_factory=ModelShape)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    # Of products of float32 (policy, reference, reward model, critic): exact, or an accelerator's default (TF32 on GPUs, one bfloat16 pass
    # on TPUs), faster and good to three digits. Gold, the scalar head and the sentence encoder are exact in any case.
    matmul_precision: Literal["highest", "default"] = "highest"
    # Memory settings: they change results by rounding at most, and no stage's hash.
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes: all but products with kernels; whole layers
    offload_frozen: bool = False  # keep the reference, reward and SFT models of a PPO round in host memory, one at a time on the device
    logits_chunk: int | None = None  # positions whose logits are computed at a time in training and scoring; None: at most 2²⁶ logits

    def __post_init__(self) -> None:
        if self.logits_chunk is not None and self.logits_chunk < 1:
            raise ValueError(f"model.logits_chunk {self.logits_chunk} must be at least 1 position; leave it out for a size that fits.")


@dataclass(frozen=True)
class TokenizerConfig:
    """`source`: a folder or hub id; None: the model's own, else trained on the run's text (toy: its word list)."""

    __pydantic_config__ = STRICT

    source: str | None = None
    vocab_size: int = 1024  # of a tokenizer trained here
    chat_template: str | None = None  # renders conversations: a Jinja template, or a file of one; None: the tokenizer's own


@dataclass(frozen=True)
class PairsConfig:
    """Preference pairs: read from data as they are, or sampled from π_SFT and labelled by gold (the OCRM paper)."""

    __pydantic_config__ = STRICT

    source: Literal["data", "sample"] = "data"
    num_pairs: int = 2_000  # sampled pairs
    num_valid: int = 500  # held-out prompts sampled twice, for the reward models' accuracy; pairs of equal gold are left out
    temperature: float = 1.0  # the importance weights' denominator is π_SFT at this temperature
    label: Literal["argmax", "bradley_terry"] = "argmax"  # argmax: ties to the first; bradley_terry: sampled
    label_flip: float = 0.0  # share of labels flipped at random
    batch_size: int = 128


@dataclass(frozen=True)
class GoldConfig:
    """The true reward, where there is one: `toy`, a reward-model folder (`model`), or a Python function (`module:attribute`)."""

    __pydantic_config__ = STRICT

    kind: Literal["none", "toy", "model", "function"] = "none"
    source: str | None = None  # folder or hub id, or module:attribute
    dtype: Literal["float32", "bfloat16"] = "float32"  # of a model's computation
    batch_size: int = 32
