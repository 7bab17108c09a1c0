"""The stage at the end of every round: what the policy writes, what gold and the reward model say of it, how far it has moved."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxrlhf import rng
from jaxrlhf.data.read_report import ReadReport
from jaxrlhf.data.tokens import finished_responses, pad_id_of, tokenize_prompts
from jaxrlhf.evaluation.diagnostics import accuracy_interval, agreement_with_gold, reliability, write_reliability
from jaxrlhf.evaluation.intervals import Interval, as_fields, from_fields, mean_interval
from jaxrlhf.evaluation.samples import Samples, read_samples, write_samples
from jaxrlhf.evaluation.winrate import win_rate
from jaxrlhf.models.hub import Loaded, eos_ids
from jaxrlhf.offline.logprobs import response_logps
from jaxrlhf.pipeline import inputs
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.pipeline.stages.ensemble import reward_inputs, reward_scores, spread_of
from jaxrlhf.pipeline.stages.pairs import two_responses
from jaxrlhf.scorers import Scorer
from jaxrlhf.storage.blocks import NOWHERE, Blocks
from jaxrlhf.storage.stage import Done, Stage
from jaxrlhf.types import TextBatch


def evaluation_stage(
    run: RunContext,
    number: int,
    *,
    policy: Done,
    sft: Done,
    rewards: tuple[Done, ...],
    ensemble: Literal["mean", "mean-minus-spread"] | None,
    before: Done | None,
) -> Done:
    """`before` is the evaluation of the policy the round started from; `rewards` the reward model of the round, or the members of its
    `ensemble`; none where the method has none. Round 0 is π_SFT."""
    config = run.config

    def build(folder: Path) -> dict[str, Any]:
        loaded = run.load(policy, head="lm")
        gold = inputs.gold_of(config, run.mesh)
        samples = sample_responses(run, folder, loaded, gold, number)
        kl = np.zeros(len(samples.rows), np.float32)
        if policy.hash != sft.hash:
            kl = kl_to(run, loaded, run.load(sft, head="lm"), samples.tables[0], "evaluation, log-probs", "π_SFT", number)
        earlier = read_samples(before.folder, pad_id_of(loaded.tokenizer)) if before is not None else samples
        result = {**gold_figures(samples, gold, run.blocks), **gold_change(samples, earlier), **as_fields("kl_sft", mean_if_finite(kl))}
        result |= length_figures(samples, loaded)
        proxy, start = None, None
        if rewards:
            figures, proxy, start = proxy_figures(run, rewards, spread_of(ensemble, config), samples, earlier)
            result |= figures
            if earlier.gold is not None:
                diagram = reliability(start, earlier.gold)
                write_reliability(folder, diagram)
                result |= as_fields("ece", from_fields(diagram, "ece"))
        write_samples(folder, samples, kl, eos_ids(loaded), proxy=proxy, proxy_start=start)
        return result

    slice_ = {
        "evaluation": asdict(config.evaluation),
        "gold": inputs.gold_identity(config),
        "data": inputs.data_identity(config),
        "limits": asdict(config.data.limits),
        "response_length": config.ppo.response_length,
        "dtype": config.model.dtype,
    }
    sources = {"policy": policy, "sft": sft}
    sources |= reward_inputs(rewards)
    sources |= {"before": before} if before is not None else {}
    slice_ |= {"spread_coef": spread_of(ensemble, config)} if rewards and ensemble else {}
    name = "sft-evaluation" if number == 0 else f"r{number}-evaluation"
    return run.build(Stage(name, "data", "evaluation", slice_, sources, version=4, parent="policy"), build, round=number)


def sample_responses(run: RunContext, folder: Path, loaded: Loaded, gold: Scorer | None, round: int) -> Samples:
    """Two responses to every evaluation prompt, from the same random numbers for every policy: differences are the policies'."""
    config = run.config
    rows = inputs.evaluation_prompts_of(config, loaded.tokenizer)
    table, cut = tokenize_prompts(rows, loaded.tokenizer, inputs.limits_of(config))
    run.report_rows(folder, "prompts", ReadReport(kept=len(rows)), cut)
    few = too_few(config.evaluation.num_prompts, len(rows), len(cut.dropped))
    rows = [rows[i] for i in cut.rows]
    run.log.note(f"{'SFT' if round == 0 else f'round {round}'} evaluation on {len(rows)} prompts{few}")
    key = rng.stream(rng.root_key(config.text_seed), "evaluation")  # π_SFT is evaluated once for all seeds that share it
    how = {"first": 0, "temperature": config.evaluation.temperature, "batch_size": config.evaluation.batch_size}
    tables, texts = two_responses(run, loaded, table, [key, key], "evaluation", round=round, **how)
    prompts = [row.prompt for row in rows]
    scores = None if gold is None else tuple(gold(prompts, text, run.blocks) for text in texts)
    return Samples(rows, tables, texts, scores)  # type: ignore[arg-type]


def too_few(asked: int, held_out: int, too_long: int) -> str:
    """Why an evaluation has fewer prompts than were asked for; of those held out no more than `asked` were read."""
    if held_out - too_long >= asked:
        return ""
    long = f"{too_long} of {'them' if held_out < asked else 'those held out are'} too long" if too_long else ""
    why = ", ".join([f"{held_out} are held out"] * (held_out < asked) + [long] * bool(long))
    return f" (warning: evaluation.num_prompts asks for {asked}, {why}; intervals are wider for it)"


def mean_if_finite(values_N: np.ndarray) -> Interval:
    """`mean_interval`; nan where a value is not finite: a policy or reward model that diverged is a finding, and the run goes on."""
    return mean_interval(values_N) if np.isfinite(values_N).all() else Interval(np.nan, np.nan, np.nan, len(values_N))


def gold_figures(samples: Samples, gold: Scorer | None, blocks: Blocks = NOWHERE) -> dict[str, Any]:
    """Mean gold of the first responses, and how often they beat their references, each with its interval over prompts."""
    nothing = as_fields("win_rate", None) | {"tie_rate": None}
    if gold is None or samples.gold is None:
        return {**as_fields("gold", None), **nothing}
    scores = samples.gold[0]
    mean = as_fields("gold", mean_interval(scores))
    with_reference = [i for i, row in enumerate(samples.rows) if row.reference is not None]
    if not with_reference:
        return {**mean, **nothing}
    prompts, references = ([getattr(samples.rows[i], name) for i in with_reference] for name in ("prompt", "reference"))
    # A model in batches may round the same text twice to two scores; equal texts tie.
    same = [samples.texts[0][i] == samples.rows[i].reference for i in with_reference]
    won = win_rate(scores[with_reference], np.where(same, scores[with_reference], gold(prompts, references, blocks)))
    return {**mean, **as_fields("win_rate", Interval(won.win_rate, won.win_rate_low, won.win_rate_high, won.n)), "tie_rate": won.tie_rate}


def gold_change(samples: Samples, earlier: Samples) -> dict[str, Any]:
    """What the round changed: gold of its policy less gold of the policy it started from, on the same prompts."""
    if samples.gold is None or earlier.gold is None or earlier is samples:
        return as_fields("gold_change", None)
    return as_fields("gold_change", mean_interval(samples.gold[0].astype(np.float64) - earlier.gold[0]))


def length_figures(samples: Samples, loaded: Loaded) -> dict[str, float]:
    first = samples.tables[0]
    ended = finished_responses(first.response_BT, first.response_mask_BT, eos_ids(loaded))  # type: ignore[arg-type]
    return {"length": float(np.asarray(first.response_mask_BT).sum(axis=1).mean()), "eos_rate": float(ended.mean())}


def kl_to(run: RunContext, loaded: Loaded, other: Loaded, texts: TextBatch, what: str, called: str, round: int) -> np.ndarray:
    """log π(y) − log π'(y) of every response, nats [N] (k1), at the temperature they were sampled at; the `other` policy is `called` so."""
    options = {
        "temperature": run.config.evaluation.temperature or 1.0,  # greedy text has no density of its own; it is read at 1
        "batch_size": run.config.evaluation.batch_size,
        "mesh": run.mesh,
    }
    logps = [
        response_logps(one.model, one.params, texts, **run.kept(f"{what} under {name}", round=round), **options)
        for one, name in ((loaded, "the policy"), (other, called))
    ]
    return logps[0] - logps[1]


def proxy_figures(
    run: RunContext, rewards: tuple[Done, ...], spread_coef: float | None, samples: Samples, earlier: Samples
) -> tuple[dict[str, Any], np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The reward model on what the round's policy writes (`proxy`) and on what it wrote before the round (`proxy_start`).

    (figures, scores [N] of the round's first responses, scores [N] of both responses from before the round).

    `reward_accuracy` is taken on the latter: on text of the policy that it produced, selection puts even a perfect fit below one half.
    With a `spread_coef` all three are of the ensemble's one score, and `proxy_spread` and `proxy_start_spread` say how far its members
    lie apart: the mean over responses of their population deviation.
    """
    tables = (samples.tables[0], *earlier.tables)
    scores, spreads = reward_scores(run, rewards, spread_coef, tables)
    proxy, start = scores[0], (scores[1], scores[2])
    accuracy = None if earlier.gold is None or not np.isfinite(start).all() else agreement_with_gold(start, earlier.gold)
    change = proxy.astype(np.float64) - start[0]
    values = {"proxy": proxy, "proxy_start": start[0], "proxy_change": change}  # the change is paired: the prompts are the same
    figures = {key: x for name, one in values.items() for key, x in as_fields(name, mean_if_finite(one)).items()}
    figures |= as_fields("reward_accuracy", earlier.gold and accuracy_interval(accuracy, earlier.gold))
    if spread_coef is not None:
        means = {"proxy_spread": spreads[0].mean(), "proxy_start_spread": spreads[1].mean()}
        figures |= {name: float(mean) if np.isfinite(mean) else None for name, mean in means.items()}
    return figures, proxy, start
