"""What the figures of a sweep say."""

from jaxrlhf.pipeline.table import proxy_alone_rose
from jaxrlhf.sweep.statistics import Sweep, chance_beyond, format_estimate


def findings(sweep: Sweep) -> list[str]:
    """Sentences computed from the figures; every one holds whichever way they came out."""
    return [*_missing(sweep), *_seeds(sweep), *_differences(sweep), *_stale(sweep), *_equal(sweep), *_notes(sweep)]


def _missing(sweep: Sweep) -> list[str]:
    lines = [f"seed {run.seed}, {run.arm} failed and is not in the table: {run.error}" for run in sweep.runs if run.state == "failed"]
    pending = sum(run.state == "pending" for run in sweep.runs)
    return lines + ([f"{pending} of {len(sweep.runs)} runs are not finished yet."] if pending else [])


def _seeds(sweep: Sweep) -> list[str]:
    seeds = sorted({run.seed for run in sweep.runs if run.state == "finished"})
    lines = []
    if len(seeds) == 1:
        lines.append(f"This is one seed ({seeds[0]}): it has no error, and a difference between rows means nothing yet.")
    if seeds and sweep.sft_seed is not None:
        lines.append(
            f"All seeds share one π_SFT and its text (sft_seed {sweep.sft_seed}): the errors are conditional on it, and too small."
        )
    return lines


def _differences(sweep: Sweep) -> list[str]:
    """Which rows differ from the first by two standard errors, and how often chance alone does that."""
    found = {arm: one for arm in sweep.settings if (one := sweep.difference(arm)) and one.se is not None}
    if not found:
        return []
    groups: dict[str, list[str]] = {"above": [], "below": [], "within": []}
    for arm, one in found.items():
        beyond = not abs(one.mean) <= 2 * (one.se or 0.0)  # NaN is not within anything
        groups["within" if not beyond else "above" if one.mean > 0 else "below"].append(f"{arm} {format_estimate(one, 2, sign=True)}")
    lines = [
        f"Differences smaller than 2 standard errors are not differences. Final gold against {sweep.first}, seed by seed: "
        + "; ".join(f"{name}: {', '.join(arms) or 'none'}" for name, arms in groups.items())
        + "."
    ]
    fewest = min(one.n for one in found.values())
    chance = chance_beyond(fewest)
    lines.append(
        f"With {fewest} seeds, chance alone puts {100 * chance:.0f} % of rows beyond 2 standard errors: about {chance * len(found):.1f} "
        f"of these {len(found)}."
    )
    return lines


def _stale(sweep: Sweep) -> list[str]:
    """Where the reward model in use liked the last policy better, and gold did not."""
    counts = []
    for arm in sweep.settings:
        known = [stale for run in sweep.finished(arm) if (stale := proxy_alone_rose(run.rounds, run.rounds[-1])) is not None]
        if any(known):
            counts.append(f"{arm} in {sum(known)} of {len(known)} runs")
    return [f"In the last round the proxy rose while gold fell: {', '.join(counts)}."] if counts else []


def _equal(sweep: Sweep) -> list[str]:
    """What the comparison needs to be equal, and where it is not."""
    sampling = {arm: setting for arm, setting in sweep.settings.items() if setting["episodes"]}
    without = [arm for arm in sweep.settings if arm not in sampling]
    lines = [f"{', '.join(without)}: trained on the offline pairs, no episodes sampled."] if without else []
    same = []
    for name, said in (("episodes", "episodes"), ("prompts", "prompts"), ("response_length", "generation length in tokens")):
        values = {arm: setting[name] for arm, setting in sampling.items()}
        if len(set(values.values())) == 1:
            same.append(f"{said} ({next(iter(values.values())):,})")
        elif values:
            groups = {value: [arm for arm in values if values[arm] == value] for value in values.values()}
            spelled_out = (f"{', '.join(arms)} {value:,}" for value, arms in groups.items())
            lines.append(f"Rows differ in {said}: {'; '.join(spelled_out)}.")
    return [*lines, *([f"Equal in all rows that sample: {', '.join(same)}."] if same and len(sampling) > 1 else [])]


def _notes(sweep: Sweep) -> list[str]:
    """What the runs themselves note, with the arms they note it of."""
    said: dict[str, list[str]] = {}
    for run in sweep.runs:
        for note in run.notes:
            if run.arm not in said.setdefault(note, []):
                said[note].append(run.arm)
    return [f"{', '.join(arms)}: {note}" for note, arms in said.items()]
