"""Makes ppo_losses.json: one PPO step after the rollout, in torch, in the formulas of N+ (summarize_from_feedback_details).

    python tests/golden/make_ppo_losses.py        (needs torch)

The conventions of that code are kept on purpose (sequence lengths instead of masks, filler log-probs of 1, an explicit
loop for GAE); only the wording is ours. Rows: EOS in the middle, EOS at once, EOS last, no EOS.
"""

import json
from pathlib import Path

import torch

FILE = Path(__file__).with_name("ppo_losses.json")
B, T = 4, 6
LAST = [2, 0, 5, 5]  # index of the last response token
KL_COEF, GAMMA, LAM, CLIP, CLIP_VALUE = 0.05, 0.98, 0.95, 0.2, 0.2
FILLER = 1.0


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask).sum() / mask.sum()


def whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    out = (x - mean) * torch.rsqrt(variance + 1e-8)
    return out if shift_mean else out + mean


def compute() -> dict:
    torch.manual_seed(3)
    last = torch.tensor(LAST)
    position = torch.arange(T).expand(B, T)
    padding, padding_p1 = position > last[:, None], position > last[:, None] + 1
    old_logp, reference_logp = -3 * torch.rand(B, T), -3 * torch.rand(B, T)
    new_logp = (old_logp + 0.3 * torch.randn(B, T)).requires_grad_()
    old_values, scores = torch.randn(B, T), torch.tensor([0.75, -1.0, 2.5, -0.3])
    new_values = (old_values + 0.3 * torch.randn(B, T)).requires_grad_()

    kl = old_logp.masked_fill(padding, FILLER) - reference_logp.masked_fill(padding, FILLER)
    rewards = -KL_COEF * kl
    end = torch.where(last + 1 < T, last + 1, last)
    rewards[torch.arange(B), end] += scores
    values = old_values.masked_fill(padding_p1, 0)
    whitened_rewards = whiten(rewards, ~padding_p1, shift_mean=False).masked_fill(padding_p1, 0)

    advantage, reversed_ = torch.zeros(B), []
    for t in reversed(range(T)):
        following = values[:, t + 1] if t < T - 1 else 0.0
        advantage = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * advantage
        reversed_.append(advantage)
    advantages = torch.stack(reversed_[::-1], 1)
    returns = advantages + values
    whitened = whiten(advantages, ~padding).masked_fill(padding, 0)

    log_ratio = new_logp.masked_fill(padding, FILLER) - old_logp.masked_fill(padding, FILLER)
    ratio = log_ratio.exp()
    plain, bounded = -whitened * ratio, -whitened * ratio.clamp(1 - CLIP, 1 + CLIP)
    policy_loss = masked_mean(torch.max(plain, bounded), ~padding)
    v = new_values.masked_fill(padding_p1, 0)
    v_clipped = torch.clamp(v, values - CLIP_VALUE, values + CLIP_VALUE)
    squared, squared_clipped = (v - returns) ** 2, (v_clipped - returns) ** 2
    value_loss = 0.5 * masked_mean(torch.max(squared, squared_clipped), ~padding_p1)

    return {
        "settings": {"kl_coef": KL_COEF, "gamma": GAMMA, "lam": LAM, "clip": CLIP, "clip_value": CLIP_VALUE},
        "inputs": {
            "mask": (~padding).tolist(), "old_logp": old_logp.tolist(), "reference_logp": reference_logp.tolist(),
            "new_logp": new_logp.tolist(), "old_values": old_values.tolist(), "new_values": new_values.tolist(), "scores": scores.tolist(),
        },
        "expected": {
            "value_mask": (~padding_p1).tolist(), "rewards": rewards.tolist(), "whitened_rewards": whitened_rewards.tolist(),
            "advantages": advantages.tolist(), "returns": returns.tolist(), "whitened_advantages": whitened.tolist(),
            "policy_loss": policy_loss.item(), "policy_gradient": torch.autograd.grad(policy_loss, new_logp)[0].tolist(),
            "value_loss": value_loss.item(), "value_gradient": torch.autograd.grad(value_loss, new_values)[0].tolist(),
            "approxkl": (0.5 * masked_mean(log_ratio**2, ~padding)).item(),
            "clipfrac": masked_mean((bounded > plain).float(), ~padding).item(),
            "value_clipfrac": masked_mean((squared_clipped > squared).float(), ~padding_p1).item(),
        },
    }  # fmt: skip


if __name__ == "__main__":
    FILE.write_text(json.dumps(compute()) + "\n")
