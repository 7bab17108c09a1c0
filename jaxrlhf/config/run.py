"""The config of a whole run."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from jaxrlhf.config.data import STRICT, DataConfig, GoldConfig, ModelConfig, PairsConfig, TokenizerConfig
from jaxrlhf.config.guards import GuardsConfig
from jaxrlhf.config.training import DPOConfig, LoraConfig, PPOConfig, RewardConfig, SFTConfig
from jaxrlhf.config.updates import EncoderConfig, FilterConfig, RefitConfig, SynthesizeConfig, WeightsConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation at the end of every round."""

    __pydantic_config__ = STRICT

    num_prompts: int = 500
    temperature: float = 1.0
    batch_size: int = 128


@dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; −1: all remaining ones."""

    __pydantic_config__ = STRICT

    engine: Literal["jit", "pmap"] = "jit"  # pmap: one replica per device (fsdp and tensor are 1), in one process
    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """When a training saves its state: as `minutes` or `every` says, at its last step, and when it is told to stop."""

    __pydantic_config__ = STRICT

    minutes: float | None = 10.0  # between two checkpoints; None: at steps alone
    every: int | None = None  # steps of a stage; None: by time alone
    keep: int = 2  # the newest so many; where the last is damaged, the stage goes on from the one before
    on_nonfinite: Literal["stop", "skip"] = "stop"  # where loss or gradient is not finite; skip: leave that step out and go on
    max_nonfinite: int = 3  # skip: so many such steps in a row stop it all the same


@dataclass(frozen=True)
class LogConfig:
    __pydantic_config__ = STRICT

    tensorboard: bool = True
    wandb: str | None = None  # project name; nothing is sent anywhere unless it is given
    every: int = 1  # steps between lines of metrics.jsonl
    # When something compiles after the first step of a loop: a line, an error, or nothing. YAML reads a bare `off` as False.
    recompiles: Annotated[Literal["warn", "error", "off"], BeforeValidator(lambda given: "off" if given is False else given)] = "warn"


@dataclass(frozen=True)
class Config:
    """A run: one method, or several arms that share every stage with equal inputs."""

    __pydantic_config__ = STRICT

    name: str = "run"
    seed: int = 0
    sft_seed: int | None = None  # seed of the text and of π_SFT; None: `seed`. If given, the seeds of a sweep share both
    method: str = "ocrm"  # a row of algorithms.rounds.METHODS, or module:attribute of one
    row: dict[str, Any] = field(default_factory=dict)  # columns of that row (algorithms.rounds.Method) to change: {reference: previous}
    rounds: int = 3
    output: str = "runs"
    store: str | None = None  # folder or URL of the finished stages; None: <output>/.stages
    standalone: bool = False  # copy stages into the run folder instead of linking them
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)  # name → overrides with dotted keys; each arm is a run
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
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def text_seed(self) -> int:
        """The seed of all stages up to π_SFT."""
        return self.seed if self.sft_seed is None else self.sft_seed
