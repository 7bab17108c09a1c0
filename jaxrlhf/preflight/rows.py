"""Checks of the rows: what is dropped or cut, what the labels say, and the floor that a reward model must beat."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from jaxrlhf.data.pairs import Demonstration, Pair, Prompt
from jaxrlhf.data.tokens import eos_ids_of, finished_responses
from jaxrlhf.evaluation.baselines import pair_baselines
from jaxrlhf.evaluation.intervals import Interval
from jaxrlhf.pipeline import inputs
from jaxrlhf.preflight.screen import GREEN, RED, YELLOW, Found
from jaxrlhf.preflight.subject import SEEN, Subject


def spelled(one: Interval) -> str:
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"


def lengths(subject: Subject) -> Found:
    """Prompts and responses that the limits cut or drop, of the first rows."""
    limits, (asked, pairs) = subject.config.data.limits, (subject.prompt_tokens[1], subject.pair_tokens[1])
    prompts, responses = asked.kept + len(asked.dropped), 2 * (pairs.kept + len(pairs.dropped))
    long = asked.counts["prompts truncated"] + asked.reasons()["prompt too long"]
    cut = pairs.counts["responses truncated"] + pairs.reasons()["response too long"]
    figure = (
        f"{long} of {prompts} prompts over {limits.max_prompt_length} tokens ({limits.long_prompt}), "
        f"{cut} of {responses} responses over {limits.max_response_length} ({limits.long_response})"
    )
    if max(long / prompts, cut / responses) <= 0.05:
        return Found(GREEN, figure)
    advice = "raise data.limits, or shorten the data: a response that is cut has no EOS"
    return Found(RED if cut > 0.95 * responses else YELLOW, figure, advice)


def eos(subject: Subject) -> Found:
    """Whether the responses that are learned end in EOS: a policy learns to stop from them alone."""
    table, _ = subject.texts
    ended = finished_responses(table.response_BT, table.response_mask_BT, eos_ids_of(subject.tokenizer))  # type: ignore[arg-type]
    figure = f"{int(ended.sum())} of {len(ended)} responses end in EOS"
    if ended.mean() >= 0.5:
        return Found(GREEN, figure)
    advice = "the policy learns to stop from responses that end: raise data.limits.max_response_length, or look at the tokenizer's EOS"
    return Found(YELLOW if ended.any() else RED, figure, advice)


def floor(subject: Subject) -> Found | None:
    """What the labels say: pairs that contradict each other, an answer that always wins, and how far the longer response and a bag of words
    get on the held-out pairs; well below a half, the two files disagree."""
    if subject.samples_pairs:
        return None
    train, valid, report = subject.pairs
    said = {(p.prompt, p.chosen, p.rejected) for p in [*train, *valid]}
    both = sum((prompt, b, a) in said for prompt, a, b in said)
    equal = sum(n for why, n in report.reasons().items() if why.startswith("identical"))
    common = Counter(p.chosen for p in train).most_common(1)[0][1] / len(train)
    fitted, held = ([(p.chosen, p.rejected) for p in rows[:SEEN]] for rows in (train, valid))
    found = pair_baselines(fitted, held, [np.array([len(pair[side]) for pair in held]) for side in (0, 1)])
    longer, words = (Interval(*(found[name][key] for key in ("accuracy", "low", "high", "pairs"))) for name in ("longer", "bag_of_words"))
    figure = (
        f"{len(said):,} pairs, {both} in both orders, {equal} with equal sides, the likeliest chosen text {common:.0%}; of {longer.n} "
        f"held-out pairs the longer response is right in {spelled(longer)}, a bag of words in {spelled(words)}"
    )
    if words.high < 0.5:
        advice = "what the training pairs teach is wrong on the held-out ones: one of the two may have its sides swapped"
        return Found(RED, figure, advice)
    faults = ["a pair in both orders teaches nothing: leave such pairs out"] * (both > 0.01 * len(said))
    faults += ["one answer is nearly always the chosen one: that is all a reward model may learn"] * (common > 0.9)
    faults += ["length alone tells much of the label: a reward model may learn no more"] * (longer.low > 0.6 or longer.high < 0.4)
    return Found(YELLOW if faults else GREEN, figure, "; ".join(faults) or "a reward model must beat both")


def duplicates(subject: Subject) -> Found | None:
    """Prompts on both sides of the split: equal ones are left out by the run, nearly equal ones are not."""
    if subject.config.data.train == inputs.TOY:
        return None
    sets = [subject.demonstrations, subject.prompts, *([] if subject.samples_pairs else [subject.pairs[::2]])]
    equal = max(report.reasons()["held out"] for _, report in sets)
    trained, held = plain(row for rows, _ in sets for row in rows), plain(inputs.held_out_of(subject.config, subject.tokenizer))
    near = len(trained & held)
    figure = f"{len(held):,} held-out prompts: {equal} training rows with one of them are left out, {near} differ by case or space alone"
    if near or equal:
        return Found(RED if near > 0.2 * len(held) else YELLOW, figure, "one file may hold rows of the other: split by prompt")
    return Found(GREEN, figure)


def plain(rows: Iterable[Demonstration | Prompt | Pair]) -> set[str]:
    return {" ".join(row.prompt.lower().split()) for row in rows} - {""}


def gold(subject: Subject) -> Found | None:
    """Whether gold tells responses apart."""
    if subject.gold is None:
        return None
    given = subject.demonstrations[0][:32]
    asked, texts = [d.prompt for d in given], [d.response for d in given]
    scores = subject.gold([*asked, *asked], [*texts, *texts[1:], texts[0]])
    figure = f"{len(scores)} responses: {scores.mean():.3g}, deviation {scores.std():.3g}"
    if not np.isfinite(scores).all():
        return Found(RED, figure, "a score is not finite: the gold model's weights may not be")
    if scores.std() <= 1e-6 * (1 + abs(float(scores.mean()))):
        return Found(RED, figure, "gold says the same of every response: nothing can be learned from it")
    return Found(GREEN, figure)
