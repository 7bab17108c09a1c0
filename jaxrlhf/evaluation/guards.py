"""Guards: a figure that shows that a run has gone wrong is said once, with the likely cause and what to do.

A guard speaks where the whole 95 % interval of its figure lies beyond its bound (one against chance where it does not lie above); a figure
whose spread is not kept (a mean over a rollout, ESS) is taken as it is. All comes from what a run stores: one that goes on says the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrlhf.config.guards import GuardName, GuardsConfig
from jaxrlhf.evaluation.intervals import Interval, correlation_interval, proportion

Figures = dict[GuardName, Interval]
Relation = Literal["above", "below", "not above", "beyond ±"]


class GuardStop(RuntimeError):
    """A guard that `guards.stop` names has spoken."""


class Guard(NamedTuple):
    """`what` is the figure in words."""

    name: GuardName
    what: str
    relation: Relation
    bound: Callable[[GuardsConfig], float]
    cause: str
    remedy: str


GUARDS = (
    Guard("reward", "the reward model's accuracy on held-out pairs", "not above", lambda _: 0.5,
          "noisy labels, chosen and rejected swapped, a training too short or too fast, or too few pairs to tell",
          "Compare with `baselines` in summary.json; a policy learns nothing from such a reward."),
    Guard("reward_own_text", "the reward model's accuracy on the policy's own text, as gold orders it,", "not above", lambda _: 0.5,
          "the policy has left the text that the reward model was fitted on, or too few prompts to tell",
          "Refit it (a method with a reward update), raise ppo.kl_coef, or sample fewer episodes a round."),
    Guard("ties", "the share of pairs of different responses that gold scores alike", "above", lambda guards: guards.ties,
          "gold does not read the response", "Call gold.source on two different responses by hand."),
    Guard("cut", "the share of responses cut at ppo.response_length", "above", lambda guards: guards.cut,
          "the policy has not learned to end (SFT too short, or on text that was cut), or the limit is too low",
          "Raise ppo.response_length or data.limits.max_response_length, or set ppo.missing_eos_penalty or missing_eos_score."),
    Guard("empty", "the share of responses without text", "above", lambda guards: guards.empty,
          "the reward pays for ending at once", "Score an empty response with the reward model; raise ppo.kl_coef."),
    Guard("kl", "KL to the reference, nats a response,", "above", lambda guards: guards.kl,
          "the reward outweighs the penalty and the policy exploits the reward model",
          "Raise ppo.kl_coef, lower ppo.learning_rate, or sample fewer episodes; read the samples before you believe the proxy."),
    Guard("entropy", "the policy's entropy, nats a token,", "below", lambda guards: guards.entropy,
          "the policy has collapsed to one response a prompt", "Lower ppo.learning_rate, raise ppo.kl_coef or ppo.entropy_coef."),
    Guard("ess", "the effective share of the pairs under the importance weights", "below", lambda guards: guards.ess,
          "the policy has moved far from the text of the pairs, and a few of them carry the fit",
          "Lower weights.eta or set it to ess, or raise weights.alpha."),
    Guard("length_correlation", "the correlation of the reward model's score with a response's length", "beyond ±",
          lambda guards: guards.length_correlation, "the chosen sides of the pairs are the longer (or the shorter) ones",
          "Compare with `longer` of `baselines` in summary.json; balance the lengths, unless length is what you want."),
)  # fmt: skip


@dataclass
class Guards:
    """The guards of one run. `found` is what they have said, as summary.json has it; `say` shows a text, `keep` is called after it."""

    config: GuardsConfig
    say: Callable[[str], None]
    keep: Callable[[], None] = lambda: None
    found: list[dict[str, Any]] = field(default_factory=list)

    def see(self, figures: Figures, *, round: int | None, where: str) -> None:
        """Look at new figures. Raises GuardStop where a guard speaks that is to end the run."""
        place = f"round {round}, {where}" if round else f"SFT, {where}"
        fresh = figures.keys() - {one["name"] for one in self.found}
        seen = [finding(guard, figures[guard.name], guard.bound(self.config), place) for guard in GUARDS if guard.name in fresh]
        new = [{**one, "round": round} for one in seen if one]
        if not new:
            return
        self.found += new
        self.say("\n".join(f"guard {one['name']}: {one['text']}" for one in new))
        self.keep()
        for one in stopping(self.config, new):
            raise GuardStop(f"guard {one['name']}: {one['text']} It stands in guards.stop; without it there the same command goes on.")


def stopping(config: GuardsConfig, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the findings that end a run."""
    return [one for one in found if config.stop == "all" or one["name"] in config.stop]


def finding(guard: Guard, seen: Interval, bound: float, place: str) -> dict[str, Any] | None:
    """What a guard says of a figure, or None. A figure that is not finite is not its business."""
    if not math.isfinite(seen.value) or not speaks(guard.relation, seen, bound):
        return None
    low, high = (None, None) if math.isnan(seen.low) else (seen.low, seen.high)
    spelled = f"{seen.value:.3g}" + ("" if low is None else f" [{low:.3g}, {high:.3g}]") + (f" (n = {seen.n})" if seen.n else "")
    stands = "and its interval is not wholly above" if guard.relation == "not above" and low is not None else guard.relation
    said = f"{place}: {guard.what} is {spelled}, {stands} {bound:g}. Likely cause: {guard.cause}. {guard.remedy}"
    return {"name": guard.name, "figure": seen.value, "low": low, "high": high, "n": seen.n or None, "bound": bound, "text": said}


def speaks(relation: Relation, seen: Interval, bound: float) -> bool:
    """Whether the whole interval, or the value where it has no ends, stands so to the bound (`Interval.direction`)."""
    low, high = (seen.value, seen.value) if math.isnan(seen.low) else (seen.low, seen.high)
    way, mirrored = (Interval(seen.value - one, low - one, high - one, seen.n).direction for one in (bound, -bound))
    return {"above": way > 0, "below": way < 0, "not above": way <= 0, "beyond ±": way > 0 or mirrored < 0}[relation]


def line_figures(line: Mapping[str, Any], responses: int) -> Figures:
    """Of a line of metrics.jsonl: an update of PPO or RLOO from so many responses, or a reward update; none of any other."""
    entropy = "rollout/entropy" if "rollout/entropy" in line else "ppo/entropy"
    known: dict[GuardName, float | None] = {
        "kl": number(line.get("rollout/kl")),
        "entropy": number(line.get(entropy)),
        "ess": number(line.get("weights/ess_fraction")),
    }
    pairs = number(line.get("weights/pairs")) or 0.0
    counts = {"ess": int(pairs) if math.isfinite(pairs) else 0}
    found: Figures = {
        name: Interval(value, math.nan, math.nan, counts.get(name, responses)) for name, value in known.items() if value is not None
    }
    ended, length = number(line.get("rollout/eos_rate")), number(line.get("rollout/length"))
    if ended is not None and 0 <= ended <= 1:
        found["cut"] = proportion((1 - ended) * responses, responses)
        if length is not None and length >= 1:
            # EOS alone is one token: P(more) ≤ E[length] − 1, so at least this share ended and has no more.
            found["empty"] = proportion(max(1 + ended - length, 0.0) * responses, responses)
    return found


def number(value: Any) -> float | None:
    """A figure of metrics.jsonl ("NaN" is one too); None for what is no number: a damaged line, or a figure of the user's own."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def sample_figures(columns: Mapping[str, list[Any]]) -> Figures:
    """Of a samples.parquet: what share of the first responses is cut or empty, how often gold ties, how the proxy goes with length."""
    texts, n = columns["response_1"], len(columns["response_1"])
    found: Figures = {"cut": proportion(n - sum(columns["ended_1"]), n), "empty": proportion(sum(not text.strip() for text in texts), n)}
    if "gold_1" in columns:
        rows = zip(texts, columns["response_2"], columns["gold_1"], columns["gold_2"], strict=True)
        ties = [gold == other_gold for text, other, gold, other_gold in rows if text != other]
        found["ties"] = proportion(sum(ties), len(ties))
    lengths = np.array([len(tokens) for tokens in columns["response_1_tokens"]])
    if "proxy" in columns and (correlation := correlation_interval(np.array(columns["proxy"]), lengths)) is not None:
        found["length_correlation"] = correlation
    return found
