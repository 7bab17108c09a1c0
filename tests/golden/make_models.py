"""Writes models.json: logits and scores of the tiny models, by torch and transformers.

python tests/golden/make_models.py        (an environment with torch)
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tiny_models import GOLDEN, PAD, ROWS, VARIANTS, padded, write_folder
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def file_shapes(auto, config_folder, work):
    """Tensor names and shapes as transformers writes them."""
    auto.from_config(AutoConfig.from_pretrained(config_folder)).save_pretrained(work)
    with safe_open(work / "model.safetensors", framework="np") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def torch_inputs(side):
    tokens, mask = padded(side)
    mask = torch.from_numpy(mask)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": torch.from_numpy(tokens).long(), "attention_mask": mask.long(), "position_ids": positions}


@torch.no_grad()
def rows_of(model, side):
    """Logits of the real tokens of each row, in order."""
    inputs = torch_inputs(side)
    logits = model(**inputs).logits.numpy()
    return [logits[row][inputs["attention_mask"][row].bool().numpy()] for row in range(len(ROWS))]


def golden_of(name, folder):
    config = VARIANTS[name]
    shapes, logits, scores = {}, {}, None
    for kind, auto in (("lm", AutoModelForCausalLM), ("scalar", AutoModelForSequenceClassification)):
        bare = folder / f"{name}-{kind}-config"
        bare.mkdir()
        (bare / "config.json").write_text(json.dumps({**config, "num_labels": 1}))
        shapes[kind] = file_shapes(auto, bare, folder / f"{name}-{kind}-names")
        model = auto.from_pretrained(write_folder(folder / f"{name}-{kind}", {**config, "num_labels": 1}, shapes[kind]))
        model = model.eval().float()
        if kind == "lm":
            logits = {side: rows_of(model, side) for side in ("right", "left")}
            for right, left in zip(logits["right"], logits["left"], strict=True):
                np.testing.assert_allclose(left, right, atol=2e-5)
        else:
            assert model.config.pad_token_id == PAD
            with torch.no_grad():
                scores = model(**torch_inputs("right")).logits[:, 0].tolist()
    rounded = [[[float(f"{value:.7g}") for value in position] for position in row] for row in logits["right"]]
    return {"shapes": shapes, "logits": rounded, "scores": scores}


def llama3_frequencies():
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072, rope_parameters=dict(LLAMA_3_1))
    return ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))[0].tolist()


def main():
    with tempfile.TemporaryDirectory() as work:
        golden = {name: golden_of(name, Path(work)) for name in VARIANTS}
    GOLDEN.write_text(json.dumps({"models": golden, "llama3_inverse_frequencies": llama3_frequencies()}) + "\n")


if __name__ == "__main__":
    main()
