"""Makes preference_losses.json: pair losses and their gradients from torch, in the formulas of TRL and of the authors of WPO.

    python tests/golden/make_preference_losses.py        (needs torch)

Source of the formulas: TRL's RewardTrainer (margin, center_rewards_coefficient) and DPOTrainer (sigmoid; ipo, which TRL 1.16
averages over tokens; use_weighting, which TRL 1.16 does not clamp; label smoothing as TRL 0.x had it in sigmoid), and
scripts/run_wpo.py of wzhouad/WPO (weight clamped at 1, detached, label smoothing inside the weighted loss); re-written, not
copied. Gradients are with respect to the logits and, apart from that, to the two sequence log-probs.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

FILE = Path(__file__).with_name("preference_losses.json")
B, T, V = 5, 6, 7


def compute() -> dict:
    torch.manual_seed(11)
    lengths = torch.tensor([6, 3, 1, 5, 4]), torch.tensor([2, 6, 4, 1, 6])
    masks = [torch.arange(T) < n[:, None] for n in lengths]
    tokens = [torch.randint(V, (B, T)) for _ in range(2)]
    logits = [(2 * torch.randn(B, T, V)).requires_grad_() for _ in range(2)]
    for side, x in zip(tokens, logits, strict=True):  # two pairs of the likeliest tokens: their WPO weights are above 1
        side[::3] = x[::3].detach().argmax(-1)
    reference = [-4 * torch.rand(B) - 4 for _ in range(2)]
    weights, margin = torch.rand(B) * 2, torch.rand(B)
    scores = [(3 * torch.randn(B)).requires_grad_() for _ in range(2)]

    all_logp = [x.log_softmax(-1) for x in logits]
    token_logp = [torch.gather(lp, 2, t[..., None]).squeeze(2) for lp, t in zip(all_logp, tokens, strict=True)]
    logps = [(lp * m).sum(-1) for lp, m in zip(token_logp, masks, strict=True)]
    h_chosen, h_rejected = logps[0] - reference[0], logps[1] - reference[1]

    def dpo(beta: float, smoothing: float) -> torch.Tensor:
        x = beta * (h_chosen - h_rejected)
        return -F.logsigmoid(x) * (1 - smoothing) - F.logsigmoid(-x) * smoothing

    with torch.no_grad():
        entropy = [-(lp.exp() * lp).sum(-1) for lp in all_logp]
        adjust = [torch.logsumexp(2 * lp, -1) for lp in all_logp]  # log Σ_v π(v)²
        aligned = [((lp - a) * m).sum(-1) / m.sum(-1) for lp, a, m in zip(token_logp, adjust, masks, strict=True)]
        free = torch.exp(aligned[0] + aligned[1])
        clipped = free.clamp(max=1)

    gap = scores[0] - scores[1]
    lengths = [m.sum(-1) for m in masks]
    per_token = h_chosen / lengths[0] - h_rejected / lengths[1]
    losses = {
        "bradley_terry": (-F.logsigmoid(gap)).mean(),
        "bradley_terry_weighted": (weights * -F.logsigmoid(gap)).mean(),
        "bradley_terry_margin": (-F.logsigmoid(gap - margin)).mean(),
        "bradley_terry_centered": (-F.logsigmoid(gap)).mean() + 0.01 * ((scores[0] + scores[1]) ** 2).mean(),
        "dpo": dpo(0.1, 0.0).mean(),
        "dpo_smoothed": dpo(0.05, 0.2).mean(),
        "dpo_weighted": (weights * dpo(0.1, 0.0)).mean(),
        "ipo": ((h_chosen - h_rejected - 1 / (2 * 0.2)) ** 2).mean(),
        "ipo_mean": ((per_token - 1 / (2 * 0.2)) ** 2).mean(),
        "wpo": (dpo(0.05, 0.0) * clipped).mean(),
        "wpo_free": (dpo(0.05, 0.0) * free).mean(),
        "wpo_smoothed": (dpo(0.05, 0.2) * clipped).mean(),
    }
    expected = {}
    for name, loss in losses.items():
        over_scores = name.startswith("bradley")
        gradients = torch.autograd.grad(loss, scores if over_scores else logits, retain_graph=True)
        expected[name] = {"loss": loss.item(), "gradients": [g.tolist() for g in gradients]}
        if not over_scores:
            of_logps = torch.autograd.grad(loss, logps, retain_graph=True)
            expected[name]["logp_gradients"] = [g.tolist() for g in of_logps]
    stats = {
        "logp": [x.tolist() for x in token_logp], "entropy": [x.tolist() for x in entropy], "log_sum_sq": [x.tolist() for x in adjust],
        "sequence_logp": [x.tolist() for x in logps], "wpo_clipped": clipped.tolist(), "wpo_free": free.tolist(),
    }  # fmt: skip
    inputs = {
        "masks": [m.tolist() for m in masks], "tokens": [t.tolist() for t in tokens], "logits": [x.tolist() for x in logits],
        "reference": [r.tolist() for r in reference], "weights": weights.tolist(), "margin": margin.tolist(),
        "scores": [s.tolist() for s in scores],
    }  # fmt: skip
    return {"inputs": inputs, "stats": stats, "losses": expected}


if __name__ == "__main__":
    FILE.write_text(json.dumps(compute()) + "\n")
