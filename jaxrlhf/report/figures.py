"""Which figures a report has, and in which order."""

from collections.abc import Sequence
from functools import partial

from jaxrlhf.report.arms import Arm
from jaxrlhf.report.drawing import Drawing, Figure, by_round, percents, render
from jaxrlhf.report.figures_reward import (
    accuracy_by_round,
    drift_agreement,
    drift_scale,
    gold_by_kl,
    overoptimisation,
    proxy_by_kl,
    reliability_diagram,
)
from jaxrlhf.report.figures_training import (
    bars,
    filter_histogram,
    filter_similarity,
    kl_budget_by_round,
    training,
    weights_by_length,
    weights_by_round,
)

NEEDS_GOLD = "No gold scorer is named in the config (gold.kind), so nothing says how good the policy really is."
DRAWINGS = (
    Drawing("overoptimisation", "Gold and proxy as the policy moves away",
            "Gold (solid) and proxy (dashed) gained since SFT, against √KL (Gao et al. 2023), in standard deviations σ: gold's over SFT's "
            "responses; proxy's over each reward model's scores of the same held-out pairs, summed over rounds by what "
            "the round's own reward model saw change: a refit starts no jump. The gap between the two is over-optimisation.",
            overoptimisation, "Needs gold and the reward models' scores on held-out pairs, which runs of this version keep."),
    Drawing("gold_kl", "Gold against √KL", "Mean gold of the policy's responses; a star marks the peak of each run, in arms "
            "of up to three seeds.", gold_by_kl, NEEDS_GOLD),
    Drawing("proxy_kl", "Proxy against √KL", "Every round's own reward model, from the policy that entered the round to the one that left "
            "it. A refit (diamond) changes the unit: values before and after it are not comparable.", proxy_by_kl,
            "No round with a reward model is finished."),
    Drawing("gold_round", "Gold by round", "Mean gold of the policy's responses at the end of each round.",
            partial(by_round, of=lambda view: view.intervals("gold"), ylabel="gold (true reward)"), NEEDS_GOLD),
    Drawing("win_rate", "Win rate by round", "Responses of strictly higher gold than the reference's.",
            partial(by_round, of=lambda view: percents(view.intervals("win_rate")), ylabel="win rate (% of prompts)"),
            "Needs gold and reference responses."),
    Drawing("accuracy", "Reward-model accuracy by round", "On fresh pairs of the policy that enters the round, labelled by gold; dotted "
            "and hollow: on held-out pairs of the data. The line at 50 % is chance.",
            accuracy_by_round, "No round with a reward model is finished."),
    Drawing("reliability", "Reliability of the reward model", "How often the last round's reward model is right where it says it is so "
            "sure, on fresh pairs of the policy that entered the round. Below the diagonal it is too sure. Bars: "
            "Wilson's 95 % of the pairs in a bin.",
            reliability_diagram, "Needs gold and reliability.json in a round's evaluation, which runs of this version write."),
    Drawing("drift_agreement", "Drift: agreement and correlation", "Share of held-out pairs on which a "
            "refitted reward model prefers the same side as the "
            "one before it; hollow: Pearson correlation of the two models' scores.",
            drift_agreement, "Needs a refit, and valid_scores.npy of both reward models."),
    Drawing("drift_scale", "Drift: scale", "Standard deviation of the scores on the held-out pairs, refitted model over the one before.",
            drift_scale, "Needs a refit, and valid_scores.npy of both reward models."),
    Drawing("kl_budget", "KL budget", "Solid: KL to SFT at the end of the round. Dashed: KL of the round's last rollout to the penalty's "
            "reference (k1, whatever the penalty estimates); of a moving reference "
            "added up over rounds, of SFT the level itself. Where evaluation.temperature is not ppo.temperature, the two are KLs at two "
            "temperatures; a rollout is also of training prompts, and from before its own update.", kl_budget_by_round,
            "No round is finished."),
    Drawing("weights", "Weight health", "Effective sample size of each refit's importance weights.",
            partial(by_round, of=weights_by_round, ylabel="ESS (% of the pairs)", ylim=(0, 104)),
            "No refit of these runs weighs its pairs."),
    Drawing("weights_length", "Weight health by length", "Effective sample size of the last refit among pairs of similar length "
            "(first seed).", weights_by_length, "No weight_health.json: no refit of these runs weighs its pairs."),
    Drawing("filter", "Filter by round", "Mean similarity of the chosen sides that each refit kept; hollow: of all pairs, what a random "
            "draw would have (first seed).", filter_similarity, "No refit of these runs filters its pairs."),
    Drawing("filter_histogram", "Filter: what the last refit kept", "Similarity of the chosen sides (first seed).", filter_histogram,
            "No refit of these runs filters its pairs."),
    Drawing("training_score", "Training: score", "Mean score of each rollout under the round's reward model.",
            partial(training, name="rollout/score", ylabel="reward model's score (nats)"), "No policy has logged a rollout yet."),
    Drawing("training_kl", "Training: KL to SFT", "Of each rollout, k1 estimate, at ppo.temperature; that of an evaluation is at "
            "evaluation.temperature.", partial(training, name="kl/sft", ylabel="KL to SFT (nats a response)"),
            "No policy has logged its KL yet."),
    Drawing("cost_seconds", "Where the time went", "Corrections: deciding, weighing or choosing pairs, and fitting reward models from "
            "round 2 on. Compilation included; stages shared between arms count in each.",
            partial(bars, of=lambda view: view.seconds, xlabel="wall-clock (minutes)", unit=1 / 60), "No stage is finished."),
    Drawing("cost_flops", "Where the FLOPs went", "Counted: 6 · parameters · tokens of training, 2 · parameters · tokens of a forward pass "
            "or of sampling; padding not counted. A part with a count missing is left out.",
            partial(bars, of=lambda view: view.flops[0], xlabel="counted FLOPs (10¹²)", unit=1e-12), "No count is known."),
)  # fmt: skip


def draw(arms: Sequence[Arm]) -> tuple[list[Figure], list[tuple[str, str]]]:
    """(figures, (title, why it is not there) of the others)."""
    figures, absent = [], []
    for drawing in DRAWINGS:
        figure = render(drawing, arms)
        if figure is None:
            absent.append((drawing.title, drawing.missing))
        else:
            figures.append(figure)
    return figures, absent
