"""Whether a training that is killed half-way goes on to the same bits: what `jaxrlhf verify-resume` runs and compares."""

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf import distributed, sharding
from jaxrlhf.config import Config
from jaxrlhf.files import write_whole
from jaxrlhf.formatting import as_strict_json
from jaxrlhf.monitoring.metrics_file import FILE, read
from jaxrlhf.pipeline.stages.context import Loop, RunContext
from jaxrlhf.pipeline.stages.divergence import Fed
from jaxrlhf.types import TrainState


def shortened(config: Config, steps: int) -> Config:
    """The recipe with so few steps of each training, at most two rounds, and no more pairs and prompts than those need."""

    def fewer(section: Any) -> Any:
        most = steps if section.max_steps is None else min(steps, section.max_steps)
        looks = None if section.eval_steps is None else min(section.eval_steps, steps // 2)
        return replace(section, max_steps=most, warmup_steps=min(section.warmup_steps, max(most - 1, 0)), eval_steps=looks)

    ppo, pairs, sampled = config.ppo, config.pairs, config.pairs.source == "sample"
    critic = min(ppo.critic_warmup_updates, steps - 1)
    warmup = min(ppo.warmup_steps, (steps - critic) * ppo.num_ppo_epochs * ppo.num_mini_batches - 1)
    num_pairs = min(pairs.num_pairs, max(256, steps * max(config.reward.batch_size, config.dpo.batch_size)))
    return replace(
        config,
        rounds=min(config.rounds, 2),
        store=None,
        standalone=False,
        sft=fewer(config.sft),
        reward=replace(fewer(config.reward), num_reference_rows=min(config.reward.num_reference_rows or 64, 64)),
        dpo=fewer(config.dpo),
        ppo=replace(ppo, total_episodes=steps * ppo.batch_size, critic_warmup_updates=critic, warmup_steps=warmup),
        pairs=replace(pairs, num_pairs=num_pairs, num_valid=min(pairs.num_valid, 64)),
        filter=replace(config.filter, n=min(config.filter.n, num_pairs // 2)) if sampled and config.filter.n else config.filter,
        evaluation=replace(config.evaluation, num_prompts=min(config.evaluation.num_prompts, 32)),
        checkpoint=replace(config.checkpoint, minutes=None, every=steps // 2),
        log=replace(config.log, tensorboard=False, wandb=None),
    )


@dataclass
class Verified(RunContext):
    """A run that leaves the last state of each training in `part`; in `halves` each is killed once, behind its first checkpoint."""

    part: Path = Path()

    def train(
        self, folder: Path, name: str, state: TrainState, loop: Loop, fed: Fed, *, steps: int, round: int | None = None, **how: Any
    ) -> Any:
        """As `RunContext.train`; writes HASH.npz, the state, and HASH.json: the training, where this process began and the metrics."""
        half, file = self.config.checkpoint.every or 0, self.part / self.store.shared(folder).name.removeprefix(".partial-")
        begun = [0]

        def killed(state: TrainState, batches: Iterator) -> Iterator:
            begun.append(int(state.step))
            for n, one in enumerate(loop(state, batches), start=begun[-1] + 1):
                yield one  # where the loop comes back, its checkpoint is on the way to the disk
                if n == half < steps and self.part.name == "halves" and not file.with_suffix(".killed").exists():
                    die(Path(self.store.state(folder), str(n)), file.with_suffix(".killed"))

        state = super().train(folder, name, state, killed, fed, steps=steps, round=round, **how)
        tree = sharding.gather({"params": state.params, "optimizer": state.opt_state, "controller": state.controller, "step": state.step})
        if distributed.is_leader() and steps:
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            np.savez(file.with_suffix(".npz"), **{sharding.path_of(path): np.asarray(leaf) for path, leaf in leaves})  # type: ignore[arg-type]
            lines = [{key: value for key, value in line.items() if not key.startswith("time/")} for line in read(folder / FILE)]
            title = f"{self.config.name}, {name if round is None else f'round {round} {name}'}"
            facts = {"training": title, "steps": steps, "began": begun[-1], "metrics": lines}
            write_whole(file.with_suffix(".json"), json.dumps(as_strict_json(facts)))
        return state


def die(checkpoint: Path, note: Path) -> None:
    """End the leader as a power cut would, once the checkpoint is there; the others of its group end with it."""
    while not checkpoint.exists():
        time.sleep(0.05)
    if distributed.is_leader():
        note.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def verdicts(place: Path, half: int) -> Iterator[tuple[bool, str]]:
    """(the same, in words) for every training of `place`/whole against that of `place`/halves, which was killed at step `half`."""
    for path in sorted((place / "whole").glob("*.json"), key=os.path.getmtime):
        facts, other = (json.loads((place / part / path.name).read_text(encoding="utf-8")) for part in ("whole", "halves"))
        files = (np.load(place / part / f"{path.stem}.npz", allow_pickle=False) for part in ("whole", "halves"))
        a, b = (dict(file) for file in files)
        found = first_difference(a, b)
        if found is None and facts["metrics"] != other["metrics"]:
            pairs = zip_longest(facts["metrics"], other["metrics"])
            found = "metrics {} against {}".format(*next(pair for pair in pairs if pair[0] != pair[1]))
        if found is None and other["began"] != half and facts["steps"] > half:
            found = f"it went on from step {other['began']}, not from its checkpoint of step {half}"
        said = "equal" if found is None else f"DIFFERENT: {found}"
        yield found is None, f"{facts['training']}: {facts['steps']} steps, {len(a)} tensors, {said}"


def first_difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> str | None:
    """The first tensor that is not the same bits, and how far apart the two are; None where all are equal."""
    for name in sorted({*a, *b}):
        if name not in a or name not in b or a[name].dtype != b[name].dtype or a[name].shape != b[name].shape:
            return f"{name} has another shape or type, or is in one of them only"
        if a[name].tobytes() != b[name].tobytes():
            return f"{name}: largest difference {np.abs(a[name].astype(np.float64) - b[name].astype(np.float64)).max():.3g}"
    return None
