"""The compiled programs of a run, in the order it runs them, each with the shapes it is called with and all that is in memory meanwhile.

They come from the same trainers and passes that the stages use (`pipeline/stages/`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from jaxrlhf import sharding
from jaxrlhf.config import Config
from jaxrlhf.models.lora import adapters
from jaxrlhf.models.transformer import DecoderConfig
from jaxrlhf.plan.counts import Counts
from jaxrlhf.plan.models import KEY, PlannedModels, deepened, models_of, one_layer, shapes_of
from jaxrlhf.steps.state import init_state
from jaxrlhf.types import Params, TrainState


@dataclass(frozen=True)
class Read:
    """Rows that pass through a decoder, forward and, where it learns, backward: what the formulas count. Sizes are of one device."""

    model: DecoderConfig
    head: str  # "lm", "scalar" or "none"
    rows: int  # at once
    width: int  # positions that are computed
    outputs: int  # positions whose result is read: the last layer computes no others
    times: int = 1  # so many in a call, one after the other
    learns: bool = False
    adapters: int = 0  # their rank, where they alone learn
    updates: int = 1  # optimizer steps of a call
    clips: bool = False  # the norm of all gradients
    gathered: bool = False  # parameters are cut over devices, and made whole for a pass
    decoded: int = 0  # tokens a row gets one by one afterwards, from the cache of the pass
    dtype: str = "float32"
    remat: str = "none"
    chunk: int | None = None  # positions whose logits are held at a time, where the config says

    @property
    def cache(self) -> int:
        """Bytes of keys and values of one pass, with room for what is decoded."""
        c = self.model
        slots = self.width + self.decoded if self.decoded else 0
        return 2 * c.num_layers * self.rows * c.num_kv_heads * c.head_dim * slots * (2 if self.dtype == "bfloat16" else 4)


@dataclass(frozen=True)
class Program:
    """What one program needs on one device, by formula or as a compiler says: bytes, FLOPs and seconds of compilation.

    `temp` is what there is beside arguments and results at its peak; `fresh` is results that take no argument's memory.
    `flops` are of products of matrices, `traffic` what operations read and write, `sent` what the device sends others; loops count as
    often as they run.
    """

    arguments: float
    fresh: float
    temp: float
    code: float
    flops: float
    traffic: float
    sent: float
    seconds: float = 0.0
    layers: tuple[int, ...] = ()  # at which depths it was compiled, where that was not the model's own


@dataclass(frozen=True)
class Phase:
    """One program: `function.lower(*arguments)` is what the run compiles.

    `held`: trees of shapes that are in memory while it runs, by name, arguments and others; rows apart. `rows`: the arrays that have
    rows. `calls` in a whole run, None where the number of rows is not known. `tokens` of a call; `loop`: rounds of a loop that may end
    early (sampling), at most. `layers` of the decoder it runs; 0: no decoder.
    """

    stage: str
    name: str
    function: sharding.Compiled
    arguments: tuple[Any, ...]
    held: dict[str, Any]
    rows: Any
    calls: int | None
    tokens: int
    layers: int
    knobs: tuple[str, ...]
    loop: int = 1
    learned: Any = None  # the tree that has gradients, in a training step
    reads: tuple[Read, ...] = ()  # what it computes, for the formulas
    results: Any = ()  # rows that it returns

    @property
    def title(self) -> str:
        return f"{self.stage}: {self.name}"


@dataclass(frozen=True)
class Planner:
    """What the phases of one config are made from."""

    config: Config
    subjects: PlannedModels
    counts: Counts
    mesh: Any

    @property
    def models(self):
        return models_of(self.config, self.subjects, self.mesh)

    @cached_property
    def policy(self) -> Params:
        return shapes_of(self.subjects.base, "lm")

    @cached_property
    def scalar(self) -> Params:
        return shapes_of(self.subjects.reward, "scalar")

    @cached_property
    def split_params(self) -> tuple[Params, Params | None]:
        """(what learns of the policy, what is frozen): its adapters and its base, or all of it and None."""
        lora = self.config.lora
        if not lora.r:
            return self.policy, None
        how = {"r": lora.r, "alpha": lora.alpha, "targets": lora.target_modules}
        split = jax.eval_shape(lambda params, key: adapters(params, key, **how), one_layer(self.policy), KEY)
        return deepened(split, self.layers)

    def state(self, params: Params, optimizer: Any, controller: dict[str, Any] | None = None) -> TrainState:
        """The shapes of a training state; the optimizer is traced for one layer."""
        shapes = jax.eval_shape(lambda p, c: init_state(p, optimizer, c), one_layer(params), controller)
        return deepened(shapes, self.layers)

    @cached_property
    def gold_held(self) -> dict[str, Any]:
        """The gold model, which stays in memory for as long as a stage has texts for it."""
        return {} if self.subjects.gold is None else {"gold": shapes_of(self.subjects.gold, "scalar")}

    def read(self, head: str, rows: int, width: int, outputs: int, **more: Any) -> Read:
        """A pass of the policy's decoder, or the scalar model's, over `rows` of all devices at once."""
        model = self.config.model
        decoder = self.subjects.base if head == "lm" else self.subjects.reward
        how = {"dtype": model.dtype, "remat": model.remat, "chunk": model.logits_chunk} | more
        how["gathered"] = sharding.axis_sizes(self.mesh)["fsdp"] > 1
        return Read(decoder, head, -(-rows // sharding.data_shards(self.mesh)), width, outputs, **how)

    @property
    def lengths(self) -> tuple[int, int, int]:
        """(prompt, response of the data, response of a policy), tokens."""
        limits = self.config.data.limits
        return limits.max_prompt_length, limits.max_response_length, self.config.ppo.response_length

    @property
    def layers(self) -> int:
        return self.subjects.base.num_layers

    def pairs_width(self) -> int:
        """Response tokens of a training pair."""
        _, T, response = self.lengths
        return response if self.config.pairs.source == "sample" else T
