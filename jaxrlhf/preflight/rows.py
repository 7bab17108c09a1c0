"""Checks of the rows: what is dropped or cut, what the labels say, and the floor that a reward model must beat."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from jaxrlhf.data.tokens import eos_ids_of, finished_responses, tokenizer_fingerprint
from jaxrlhf.evaluation.baselines import pair_baselines
from jaxrlhf.evaluation.intervals import Interval, proportion
from jaxrlhf.models.hub import tokenizer_named
from jaxrlhf.pipeline import inputs
from jaxrlhf.preflight.screen import GREEN, RED, YELLOW, Found
from jaxrlhf.preflight.subject import SEEN, Subject

HELD_OUT = "held out"


def graded(share: float, yellow: float, red: float) -> str:
    return RED if share > red else YELLOW if share > yellow else GREEN


def spelled(one: Interval) -> str:
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"


def rows(subject: Subject) -> Found:
    """How many rows there are to learn from, and why others are not used."""
    said = {"demonstrations": subject.demonstrations, "prompts": subject.prompts}
    if not subject.samples_pairs:
        train, valid, report = subject.pairs
        said = {"pairs": ([*train, *valid], report)} | said
    figure, share = ", ".join(f"{len(found):,} {name}" for name, (found, _) in said.items()), 0.0
    for name, (found, report) in said.items():
        if dropped := {why: n for why, n in report.reasons().items() if why != HELD_OUT}:
            share = max(share, sum(dropped.values()) / (len(found) + sum(dropped.values())))
            figure += f"; {name} without {', '.join(f'{n} {why}' for why, n in dropped.items())}"
    return Found(graded(share, 0.01, 0.5), figure, "every such row is named in dropped-*.jsonl of its stage" if share > 0.01 else "")


def lengths(subject: Subject) -> Found:
    """Prompts and responses that the limits cut or drop, of the first rows."""
    limits = subject.config.data.limits
    asked, (report, sides) = subject.prompt_tokens[1], (subject.texts[1], 1) if subject.samples_pairs else (subject.pair_tokens[1], 2)
    over = [asked.counts["prompts truncated"] + asked.reasons()["prompt too long"]]
    over.append(report.counts["responses truncated"] + report.reasons()["response too long"])
    of = [asked.kept + len(asked.dropped), sides * (report.kept + len(report.dropped))]
    figure = (
        f"{over[0]} of {of[0]} prompts over {limits.max_prompt_length} tokens ({limits.long_prompt}), "
        f"{over[1]} of {of[1]} responses over {limits.max_response_length} ({limits.long_response})"
    )
    colour = RED if over[1] > 0.95 * of[1] else graded(max(over[0] / of[0], over[1] / of[1]), 0.05, 1)
    return Found(colour, figure, "raise data.limits, or shorten the data: a response that is cut has no EOS" if colour != GREEN else "")


def eos(subject: Subject) -> Found:
    """Whether the responses that are learned end in EOS: a policy learns to stop from them alone."""
    table, _ = subject.texts
    ended = finished_responses(table.response_BT, table.response_mask_BT, eos_ids_of(subject.tokenizer))  # type: ignore[arg-type]
    share, n = float(ended.mean()), len(ended)
    colour = RED if share == 0 else graded(1 - share, 0.5, 1)
    advice = "the policy learns to stop from responses that end: raise data.limits.max_response_length, or look at the tokenizer's EOS"
    return Found(colour, f"{int(ended.sum())} of {n} responses end in EOS", advice if colour != GREEN else "")


def sides(subject: Subject) -> Found | None:
    """Chosen against rejected: pairs that contradict each other or the demonstrations, answers that are always the same."""
    if subject.samples_pairs:
        return None
    train, valid, report = subject.pairs
    said = {(p.prompt, p.chosen, p.rejected) for p in [*train, *valid]}
    both = sum((prompt, b, a) in said for prompt, a, b in said)
    same = sum(n for why, n in report.reasons().items() if why.startswith("identical"))
    common = Counter(p.chosen for p in train).most_common(1)[0][1] / len(train)
    negative = sum((p.margin or 0) < 0 for p in train)
    figure = f"{len(said):,} pairs, {both} in both orders; {same} with equal sides; the likeliest chosen text is {common:.0%}"
    if subject.config.data.demonstrations is not None:
        taught = {(d.prompt, d.response) for d in subject.demonstrations[0]}
        right, wrong = (sum((p.prompt, getattr(p, side)) in taught for p in train) for side in ("chosen", "rejected"))
        if wrong > right:
            figure += f"; demonstrations are the rejected side {wrong} times, the chosen one {right}"
            return Found(RED, figure, "the sides may be swapped: look at data.rename and at a few rows")
    faults = ["a pair in both orders teaches nothing: leave such pairs out"] * (both > 0.01 * len(said))
    faults += [f"{negative} margins are below 0: they say that rejected is better"] * (negative > 0)
    faults += ["one answer is nearly always the chosen one: that is all a reward model may learn"] * (common > 0.9)
    return Found(YELLOW if faults else GREEN, figure, "; ".join(faults))


def floor(subject: Subject) -> Found | None:
    """How far the longer response and a bag of words get on the held-out pairs; well below a half, the two files disagree."""
    if subject.samples_pairs:
        return None
    fitted, held = ([(p.chosen, p.rejected) for p in rows[:SEEN]] for rows in subject.pairs[:2])
    found = pair_baselines(fitted, held, [np.array([len(pair[side]) for pair in held]) for side in (0, 1)])
    longer, words = (Interval(*(found[name][key] for key in ("accuracy", "low", "high", "pairs"))) for name in ("longer", "bag_of_words"))
    figure = f"of {longer.n} held-out pairs the longer response is right in {spelled(longer)}, a bag of words in {spelled(words)}"
    if words.high < 0.5:
        advice = "what the training pairs teach is wrong on the held-out ones: one of the two may have its sides swapped"
        return Found(RED, figure, advice)
    if longer.low > 0.6 or longer.high < 0.4:
        return Found(YELLOW, figure, "length alone tells much of the label: a reward model may learn that and no more")
    return Found(GREEN, f"{figure}: a reward model must beat both")


def duplicates(subject: Subject) -> Found:
    """Prompts on both sides of the split: equal ones are left out by the run, nearly equal ones are not."""
    config = subject.config
    generated = config.data.train == inputs.TOY
    held = (inputs.evaluation_prompts_of if generated else inputs.held_out_of)(config, subject.tokenizer)
    reports = [subject.demonstrations[1], subject.prompts[1], *([] if subject.samples_pairs else [subject.pairs[2]])]
    equal = max(report.reasons()[HELD_OUT] for report in reports)
    trained = plain(p.prompt for p in subject.prompts[0])
    trained |= set() if generated else plain(d.prompt for d in subject.demonstrations[0])
    near = len(trained & plain(p.prompt for p in held))
    figure = f"{len(held):,} held-out prompts: {equal} training rows with one of them are left out, {near} differ by case or space alone"
    if near or equal:
        return Found(RED if near > 0.2 * len(held) else YELLOW, figure, "one file may hold rows of the other: split by prompt")
    return Found(GREEN, figure)


def plain(texts: Iterable[str]) -> set[str]:
    return {" ".join(text.lower().split()) for text in texts} - {""}


def gold(subject: Subject) -> Found | None:
    """Whether gold tells responses apart, and agrees with the labels where there are any."""
    scorer = subject.gold
    if scorer is None:
        return None
    given = subject.demonstrations[0][:32]
    asked, texts = [d.prompt for d in given], [d.response for d in given]
    scores = scorer([*asked, *asked], [*texts, *texts[1:], texts[0]])
    figure = f"{len(scores)} responses: {scores.mean():.3g}, deviation {scores.std():.3g}"
    if subject.config.gold.kind == "model":
        own = tokenizer_named(subject.config.gold.source)
        same = tokenizer_fingerprint(own) == tokenizer_fingerprint(subject.tokenizer)
        figure += "" if same else "; its tokenizer is another: text is tokenised again"
    if not np.isfinite(scores).all():
        return Found(RED, figure, "a score is not finite: the gold model's weights may not be")
    if scores.std() <= 1e-6 * (1 + abs(float(scores.mean()))):
        return Found(RED, figure, "gold says the same of every response: nothing can be learned from it")
    if subject.samples_pairs:
        return Found(GREEN, figure)
    few = subject.pairs[0][:64]
    chosen, rejected = (scorer([p.prompt for p in few], [getattr(p, side) for p in few]) for side in ("chosen", "rejected"))
    agrees = proportion(float((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum()), len(few))
    figure += f"; agrees with {spelled(agrees)} of {len(few)} labels"
    if agrees.high < 0.5:
        return Found(RED, figure, "the pairs prefer what gold likes less: the sides may be swapped, or gold's sign")
    doubtful = agrees.low <= 0.5
    return Found(YELLOW if doubtful else GREEN, figure, "gold and the labels may not mean the same" if doubtful else "")
