"""Config of training: optimizers, SFT, reward models, PPO, DPO and LoRA. Argument names are TRL's where the meaning is the same."""

import math
from dataclasses import dataclass
from typing import Literal

from jaxrlhf.config.data import STRICT


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as torch names it. No warm-up and no clipping unless asked: the papers use neither."""

    __pydantic_config__ = STRICT

    learning_rate: float = 3e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-5
    weight_decay: float = 0.01
    weight_decay_on: Literal["all", "matrices"] = "all"  # all: norms and biases too, as the public code; matrices: as transformers' Trainer
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class SupervisedConfig(OptimizerConfig):
    """Training on rows, watched on held-out ones if asked: `eval_loss` and `eval_accuracy` in metrics.jsonl.

    Accuracy is the share of held-out tokens that are the likeliest (SFT) or of pairs that are ordered right (a tie is half right). A step
    kept for it has seen the held-out rows: its figure on them is flattered.
    """

    num_train_epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    eval_steps: int | None = None  # steps between two looks at the held-out rows, and one at the end; None: none
    load_best_model_at_end: bool = False  # go on with the parameters of the best look, not of the last step
    metric_for_best_model: Literal["loss", "accuracy"] = "loss"


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig):
    batch_size: int = 128
    loss_on: Literal["response", "all"] = "response"


@dataclass(frozen=True)
class RewardConfig(SupervisedConfig):
    """Bradley–Terry training. `reward_bias` (the mean score of reference responses) is recomputed after every training."""

    loss: str = "bradley_terry"  # a name in PAIR_LOSSES or module:attribute, with head "scalar"
    center_rewards_coefficient: float = 0.0
    use_margin: bool = False
    eval_batch_size: int = 128
    num_reference_rows: int | None = None  # reference responses behind `reward_bias`; None: all demonstrations
    ensemble_size: int = 4  # reward models in an ensemble; they differ in their head and the order of their pairs
    spread_coef: float = 1.0  # mean-minus-spread: the score is the members' mean minus this × their standard deviation


@dataclass(frozen=True)
class PPOConfig(OptimizerConfig):
    """One round of PPO. Defaults are those of the N+ implementation details and of the OCRM code."""

    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    total_episodes: int = 100_000  # responses sampled in a round; whole batches of them, rounded down as in the papers' code (TRL: up)
    round_prompts: Literal["fresh", "same"] = "fresh"  # every round takes new prompts, or those of round 1 again
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
    generation_batch_size: int | None = None  # responses sampled at once, which share a KV cache; None: all. Changes memory, not results
    forward_batch_size: int | None = None  # rows of a forward pass in scoring; None: all


@dataclass(frozen=True)
class DPOConfig(SupervisedConfig):
    """DPO and WPO: one pass over the preference pairs a round, against the KL reference of the method's row."""

    beta: float = 0.05
    loss: str = "dpo"  # of policy_update dpo: dpo, ipo, ipo_mean or module:attribute, with head "lm"
    label_smoothing: float = 0.0  # assumed share of wrong labels; dpo and wpo
    wpo_clip: float | None = 1.0  # of policy_update wpo: the largest weight of a pair; None: no clamp
    eval_batch_size: int = 128  # rows of a pass that computes the reference's log-probs


@dataclass(frozen=True)
class LoraConfig:
    """LoRA on the policy (Hu et al., 2021): only the adapters are trained, and merged into the model at the end of a round."""

    __pydantic_config__ = STRICT

    r: int = 0  # rank; 0: no adapters, all parameters are trained
    alpha: float = 16.0  # the update of a kernel is A·B · alpha / r
    target_modules: tuple[Literal["q", "k", "v", "out", "up", "gate", "down"], ...] = ("q", "k", "v", "out", "up", "gate", "down")

    def __post_init__(self) -> None:
        if self.r < 0:
            raise ValueError(f"lora.r is {self.r}; give a positive rank, or 0 to train all parameters.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha {self.alpha} must be finite and above 0.")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty; name the kernels that get an adapter, or leave it out for all.")
