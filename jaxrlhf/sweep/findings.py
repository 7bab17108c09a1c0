"""What the figures of a sweep say."""

from jaxrlhf.evaluation import findings as sentences
from jaxrlhf.sweep.statistics import Sweep


def findings(sweep: Sweep) -> list[str]:
    """Sentences computed from the figures; every one holds whichever way they came out."""
    trials = [sentences.Trial(run.arm, run.seed, run.rounds, finished=True) for arm in sweep.settings for run in sweep.finished(arm)]
    notes = sentences.notes_of((run.arm, run.notes) for run in sweep.runs)
    return [*_missing(sweep), *_shared(sweep), *sentences.findings(trials), *_equal(sweep), *notes]


def _missing(sweep: Sweep) -> list[str]:
    lines = [f"seed {run.seed}, {run.arm} failed and is not in the table: {run.error}" for run in sweep.runs if run.state == "failed"]
    pending = sum(run.state == "pending" for run in sweep.runs)
    return lines + ([f"Runs not finished yet: {pending} of {len(sweep.runs)}."] if pending else [])


def _shared(sweep: Sweep) -> list[str]:
    if sweep.sft_seed is None or not any(run.state == "finished" for run in sweep.runs):
        return []
    return [f"All seeds share one π_SFT and its text (sft_seed {sweep.sft_seed}): the errors are conditional on it, and too small."]


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
