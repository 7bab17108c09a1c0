"""Makes ocrm_weights.json: relative log-ratios, pair weights and the weighted reward loss of the published OCRM code's float32
formula, and the exact values in float64.

    python tests/golden/make_ocrm_weights.py        (needs torch)

Source: get_density_ratios.py and reward.py of the published code; re-written, not copied. Its mixture leaves log space, so it
underflows below about −83 nats; the exact column is the same quantity by logaddexp. alpha 0.1, eta 0.001 are the published
settings. The loss is taken where nothing underflows (`pairs`), and with a larger eta, at which the weights tell the pairs apart.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

FILE = Path(__file__).with_name("ocrm_weights.json")
ALPHA, ETA, FLOOR = 0.1, 0.001, 1e-36
POLICY = [-5.0, -40.0, -80.0, -110.0, -110.0, -150.0, -300.0, -300.0, -60.0, -82.9]
REFERENCE = [-3.0, -45.0, -95.0, -120.0, -100.0, -160.0, -310.0, -120.0, -60.0, -82.9]


def published_log_ratio(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return policy - torch.log(ALPHA * torch.exp(policy) + (1 - ALPHA) * torch.exp(reference) + FLOOR)


def weighted_loss() -> dict:
    """Pairs of short responses, their weights and the weighted Bradley–Terry loss with its gradients, at several eta and alpha."""
    torch.manual_seed(5)
    n = 8
    reference = [-45 * torch.rand(n) - 2 for _ in range(2)]
    policy = [(r + 4 * torch.randn(n)).clamp(max=-0.5) for r in reference]
    scores = [(2 * torch.randn(n)).requires_grad_() for _ in range(2)]
    relative = [published_log_ratio(p, r) for p, r in zip(policy, reference, strict=True)]
    plain = [p - r for p, r in zip(policy, reference, strict=True)]
    cases = []
    for alpha, eta, ratios in ((ALPHA, 0.001, relative), (ALPHA, 0.3, relative), (0.0, 0.01, plain), (0.0, 0.3, plain)):
        for normalize in ("none", "mean"):
            weights = torch.exp(eta * (ratios[0] + ratios[1]))
            if normalize == "mean":
                weights = weights / weights.mean()
            loss = (weights * -F.logsigmoid(scores[0] - scores[1])).mean()
            gradients = torch.autograd.grad(loss, scores)
            cases.append({
                "alpha": alpha, "eta": eta, "normalize": normalize, "weights": weights.tolist(), "loss": loss.item(),
                "gradients": [g.tolist() for g in gradients],
            })  # fmt: skip
    sides = {"policy": policy, "reference": reference, "scores": scores}
    return {**{name: [x.tolist() for x in pair] for name, pair in sides.items()}, "cases": cases}


def compute() -> dict:
    policy, reference = torch.tensor(POLICY), torch.tensor(REFERENCE)
    published = published_log_ratio(policy, reference)
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
        "pairs": weighted_loss(),
    }  # fmt: skip


if __name__ == "__main__":
    FILE.write_text(json.dumps(compute()) + "\n")
