"""Makes ocrm_weights.json: relative log-ratios and pair weights of the published OCRM code's float32 formula, and the
exact values in float64.

    python tests/golden/make_ocrm_weights.py        (needs torch)

The published formula leaves log space, so it underflows below about −83 nats; the exact column is the same quantity by
logaddexp. alpha 0.1, eta 0.001 are the published settings.
"""

import json
from pathlib import Path

import torch

FILE = Path(__file__).with_name("ocrm_weights.json")
ALPHA, ETA, FLOOR = 0.1, 0.001, 1e-36
POLICY = [-5.0, -40.0, -80.0, -110.0, -110.0, -150.0, -300.0, -300.0, -60.0, -82.9]
REFERENCE = [-3.0, -45.0, -95.0, -120.0, -100.0, -160.0, -310.0, -120.0, -60.0, -82.9]


def compute() -> dict:
    policy, reference = torch.tensor(POLICY), torch.tensor(REFERENCE)
    published = policy - torch.log(ALPHA * torch.exp(policy) + (1 - ALPHA) * torch.exp(reference) + FLOOR)
    p, r = policy.double(), reference.double()
    log_alpha, log_rest = torch.tensor(ALPHA).double().log(), torch.tensor(1 - ALPHA).double().log()
    exact = p - torch.logaddexp(log_alpha + p, log_rest + r)
    plain = policy - reference
    return {
        "alpha": ALPHA, "eta": ETA, "floor": FLOOR, "policy": POLICY, "reference": REFERENCE,
        "published": published.tolist(), "exact": exact.tolist(), "plain": plain.tolist(),
        # pairs: each response with its reverse neighbour, so that both orders occur
        "weights_published": torch.exp(ETA * (published + published.flip(0))).tolist(),
        "weights_exact": torch.exp(ETA * (exact + exact.flip(0))).tolist(),
        "weights_plain": torch.exp(ETA * (plain + plain.flip(0))).tolist(),
    }  # fmt: skip


if __name__ == "__main__":
    FILE.write_text(json.dumps(compute()) + "\n")
