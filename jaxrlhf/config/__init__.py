"""The config of a run as frozen dataclasses; YAML and the command line are parsed into them.

Argument names are TRL's where the meaning is the same. All defaults of the library are here.
"""

from jaxrlhf.config.data import (
    DataConfig,
    GoldConfig,
    LimitsConfig,
    ModelConfig,
    ModelShape,
    PairsConfig,
    Sources,
    TokenizerConfig,
    ToyTask,
)
from jaxrlhf.config.guards import GuardsConfig
from jaxrlhf.config.run import CheckpointConfig, Config, EvaluationConfig, LogConfig, MeshConfig
from jaxrlhf.config.training import DPOConfig, LoraConfig, OptimizerConfig, PPOConfig, RewardConfig, SFTConfig, SupervisedConfig
from jaxrlhf.config.updates import EncoderConfig, FilterConfig, RefitConfig, SynthesizeConfig, WeightsConfig

__all__ = [
    "CheckpointConfig", "Config", "DPOConfig", "DataConfig", "EncoderConfig", "EvaluationConfig", "FilterConfig", "GoldConfig",
    "GuardsConfig", "LimitsConfig", "LogConfig", "LoraConfig", "MeshConfig", "ModelConfig", "ModelShape", "OptimizerConfig", "PPOConfig",
    "PairsConfig", "RefitConfig", "RewardConfig", "SFTConfig", "Sources", "SupervisedConfig", "SynthesizeConfig", "TokenizerConfig",
    "ToyTask", "WeightsConfig",
]  # fmt: skip
