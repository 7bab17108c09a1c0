"""What is refused before anything is built."""

from collections.abc import Sequence

from jaxrlhf import distributed, rng, sharding
from jaxrlhf.algorithms.rounds import PREFERENCE, method_of, reward_update_named
from jaxrlhf.config import Config
from jaxrlhf.pipeline import inputs
from jaxrlhf.pipeline.stages.reward_update import check_update
from jaxrlhf.pipeline.stages.sft import given_tokenizer
from jaxrlhf.plugins import plugin
from jaxrlhf.recipe import ConfigError, to_yaml


def check_same(config: Config) -> None:
    """Raise ConfigError in a process whose config is not the leader's."""
    if distributed.agree(to_yaml(config), "the config") != to_yaml(config):
        raise ConfigError(f"process {distributed.index()} has another config than process 0; start all with the same command and recipe.")
    distributed.barrier("the same config")  # or process 0 would begin what cannot go on


def check(config: Config) -> None:
    """What the config alone cannot say of itself: unknown names, unreadable data and batches that do not divide are refused here."""
    from jaxrlhf.algorithms.policy_updates import check_rloo
    from jaxrlhf.algorithms.ppo import policy_loss_of
    from jaxrlhf.algorithms.preference import REFERENCE, preference_loss
    from jaxrlhf.algorithms.reward import called, check_columns, reward_loss

    rng.check_flags()
    method = method_of(config.method, config.row, plugin)
    if method.reward_update is not None:
        reward_update_named(method.reward_update, plugin)
        check_update(config, method.reward_update)
    if method.ensemble is not None and not method.needs_reward:
        raise ConfigError(f"row.ensemble is {method.ensemble!r}, but {method.policy_update} uses no reward model; take it out of the row.")
    if config.lora.r and not method.restart_optimizer:
        raise ConfigError(
            f"row.restart_optimizer is false and lora.r {config.lora.r}: the moments of a round belong to adapters that it merged into its "
            "policy, and the next round's are new; let the optimizer restart, or set lora.r to 0."
        )
    loss = reward_loss(config.reward, plugin)
    columns = loss.columns
    if method.needs_reward:
        check_columns(loss, method.reward_update, name=called(config.reward))
    if method.policy_update in PREFERENCE:
        preference = preference_loss(config.dpo, method.policy_update, plugin)
        check_columns(preference, method.reward_update, name=f"dpo.loss {config.dpo.loss!r}", given=("margin", *REFERENCE))
        columns = (*columns, *preference.columns)
    else:
        policy_loss_of(config.ppo, plugin)
    if method.policy_update == "rloo":
        check_rloo(config.ppo)
    inputs.check(config, given_tokenizer(config), columns=columns)
    mesh = sharding.mesh_of(config.mesh)
    if config.model.offload_frozen:
        sharding.check_offload(mesh)
    rng.root_key(config.seed)  # refuses a flag that moves its bits, before there is a stage to lose
    used = ["sft"] + ["reward"] * method.needs_reward + ["dpo" if method.policy_update in PREFERENCE else "ppo"]
    check_shards(config, used, sharding.data_shards(mesh))


def check_shards(config: Config, sections: Sequence[str], shards: int) -> None:
    """Raise ValueError unless the microbatches of these sections divide over the data shards."""
    for name in sections:
        section = getattr(config, name)
        parts = section.gradient_accumulation_steps * (config.ppo.num_mini_batches if name == "ppo" else 1)
        sharding.check_batch_size(section.batch_size, shards, name=f"{name}.batch_size", parts=parts)
        if name == "ppo" and section.generation_batch_size is not None:
            sharding.check_batch_size(section.generation_batch_size, shards, name="ppo.generation_batch_size")
