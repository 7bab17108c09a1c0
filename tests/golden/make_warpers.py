"""Which tokens transformers keeps under temperature, top-k and top-p. Run with torch and transformers installed."""

import itertools
import json
import pathlib

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def kept(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> list[list[int]]:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    out = warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits.clone())
    return [torch.nonzero(torch.isfinite(row))[:, 0].tolist() for row in out]


def first_row(top_p: float) -> int:
    """Row 0 holds ties; under top-p the unstable order of torch's sort would decide which of them is dropped."""
    return 1 if top_p < 1 else 0


def main():
    random = np.random.default_rng(0)
    logits = np.round(random.normal(size=(6, 40)) * 2, 3).astype(np.float32)
    logits[0, 3] = logits[0, 7] = logits[0].max()  # ties at the top: top-k keeps both
    cases = [
        {"temperature": t, "top_k": k, "top_p": p, "kept": kept(torch.tensor(logits[first_row(p) :]), t, k, p)}
        for t, k, p in itertools.product((0.7, 1.0, 1.5), (0, 1, 2, 5, 40), (0.1, 0.5, 0.9, 0.999, 1.0))
    ]
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    path = pathlib.Path(__file__).with_name("warpers.json")
    path.write_text(json.dumps({"made_with": made_with, "logits": logits.astype(float).round(3).tolist(), "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
