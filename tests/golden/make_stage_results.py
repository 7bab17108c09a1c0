"""What the stages of a tiny run of OCRM write into their records, its summary and its log: what fixtures of run folders are made of.

A figure that no stage writes cannot get into a fixture, and so no report can rest on it.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tiny_run import TINY

from jaxrlhf.monitoring.metrics_file import read
from jaxrlhf.pipeline.run import run
from jaxrlhf.recipe import from_mapping
from jaxrlhf.storage.record import read_record

SECTIONS = ("sft", "reward", "ppo")  # of a stage's config: what reports read


def results_of(folder: Path) -> dict[str, Any]:
    """{"stages": function → the last such stage's record, "rounds": rows of the summary, "metrics": stage → names} of a run folder."""
    stages, metrics = {}, {}
    for path in sorted((folder / "stages").iterdir()):
        record = read_record(path)
        config = {name: value for name, value in record["config"].items() if name in SECTIONS}
        stages[record["function"]] = {"inputs": sorted(record["inputs"]), "config": config, "result": record["result"]}
    for line in read(folder / "metrics.jsonl"):
        metrics[line["stage"]] = sorted({*metrics.get(line["stage"], ()), *line})
    rows = json.loads((folder / "summary.json").read_text())["rounds"]
    return {"stages": stages, "rounds": [row | {"seconds": None} for row in rows], "metrics": metrics}


def rounded(value: Any) -> Any:
    """Figures to three digits: what a machine rounds differently is no other result."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def main():
    with tempfile.TemporaryDirectory() as folder:
        found = results_of(run(from_mapping(TINY | {"method": "ocrm", "output": folder})))
    Path(__file__).with_name("stage_results.json").write_text(json.dumps(rounded(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
