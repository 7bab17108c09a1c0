"""`jaxrlhf preflight` finds each of 16 planted faults, and nothing in a sound recipe."""

import sys

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from tiny_encoder import write_tiny_bert

from jaxrlhf import rng
from jaxrlhf.cli import main
from jaxrlhf.data.pairs import Pair, write_pairs
from jaxrlhf.data.tokenizer import train_tokenizer
from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.hub import initialise, save, save_tokenizer
from jaxrlhf.preflight import models
from jaxrlhf.preflight.screen import STYLE

OWN = """
from dataclasses import replace
import jax.numpy as jnp
import numpy as np
from jaxrlhf.losses import PAIR_LOSSES
from jaxrlhf.types import PairLoss

def _field(outputs, batch, *, total=None):
    return jnp.sum(batch.chosen_scores), {}

def _ids(outputs, batch, *, total=None):
    loss, metrics = PAIR_LOSSES["bradley_terry"].loss(outputs, batch, total=total)
    return loss * jnp.sum(batch.chosen_BT != 1), metrics  # "PAD is EOS, so whatever is not EOS is text"

field, ids = PairLoss("scalar", (), _field), PairLoss("scalar", (), _ids)

def flipped(context, pairs):
    t = pairs.tokens
    t = replace(t, prompt_BL=np.roll(t.prompt_BL, 3, axis=1), prompt_mask_BL=np.roll(t.prompt_mask_BL, 3, axis=1))
    return pairs._replace(tokens=t), np.ones(len(pairs.rows), np.float32)

def stale(context, pairs):
    return pairs, np.arange(len(pairs.rows), dtype=np.float32)

def constant(prompts, responses):
    return [0.5] * len(responses)
"""


def rows(n, *, start=0, swapped=False, words=1, again=False):
    """Pairs whose wording tells the sides apart; prompts of two lengths."""
    said = [("a kind word", "a rude word")[:: -1 if swapped else 1] for _ in range(n)]
    ask = "PROMPT" if again else "prompt"
    return [
        Pair(f"p{i}", f"{ask} {'number ' * (i % 2)}{i}:", f" {a} for {i}" * words, f" {b} for {i}" * words, "")
        for i, (a, b) in enumerate(said, start=start)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, a model with its tokenizer, another tokenizer, an encoder, and the user's module."""
    folder = tmp_path_factory.mktemp("preflight")
    write_pairs(folder / "train.jsonl", rows(60))
    write_pairs(folder / "valid.jsonl", rows(30, start=60))
    write_pairs(folder / "swapped.jsonl", rows(30, start=60, swapped=True))
    write_pairs(folder / "again.jsonl", rows(30, again=True))
    write_pairs(folder / "long.jsonl", rows(60, words=20))
    tokenizer = train_tokenizer((pair.prompt + pair.chosen for pair in rows(60)), 270)
    sizes = {"family": "gpt2", "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    ids = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    loaded = initialise(config_from_shape(sizes, len(tokenizer), max_positions=64, **ids)[0], key=rng.root_key(0), tokenizer=tokenizer)
    for name in ("model", "nan"):
        save(loaded, folder / name)
    tensors = load_file(folder / "nan" / "model.safetensors")
    save_file(tensors | {"transformer.ln_f.weight": np.full(16, np.nan, np.float32)}, folder / "nan" / "model.safetensors")
    (folder / "other").mkdir()
    save_tokenizer(train_tokenizer(["rude kind word number for prompt " * 9], 268), folder / "other")
    write_tiny_bert(folder / "encoder", ["kind", "rude"])
    (folder / "own_of_preflight.py").write_text(OWN)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def found(place, tmp_path, tiny_mapping, capsys):
    """found(changes, *arguments) → (exit status, name of a check → its colour on the screen)."""

    def run(changes, *arguments):
        base = {"data__train": str(place / "train.jsonl"), "data__valid": str(place / "valid.jsonl"), "pairs__source": "data"}
        base |= {"data__limits__max_prompt_length": 32, "data__limits__max_response_length": 24, "gold__kind": "none", "sft__max_steps": 2}
        given = {key: value.replace("HERE", str(place)) if isinstance(value, str) else value for key, value in changes.items()}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_mapping(tmp_path, **base | given)))
        status = main(["preflight", str(tmp_path / "recipe.yaml"), *arguments])
        lines = capsys.readouterr().out.splitlines()
        return status, {line[13:30].strip(): line[:13].strip() for line in lines if line[:13].strip() in STYLE}

    return run


def test_a_sound_recipe_has_no_red_line(found):
    status, said = found({"model__source": "HERE/model", "method": "ocrm", "encoder__source": "HERE/encoder"})
    assert status == 0 and set(said.values()) == {"green", "yellow"}
    assert {name for name, colour in said.items() if colour == "yellow"} <= {"temperatures", "tokenizer"}
    assert len(said) >= 14


pytestmark = pytest.mark.usefixtures("one_device")
PLANTED = {
    "swapped sides": ({"data__valid": "HERE/swapped.jsonl"}, "floor", "red"),
    "PAD = EOS without masks": ({"reward__loss": "own_of_preflight:ids"}, "reward gradient", "red"),
    "another tokenizer": ({"model__source": "HERE/model", "tokenizer__source": "HERE/other"}, "tokenizer", "yellow"),
    "padding sides mixed": ({"method": "ocrm", "row": {"reward_update": "own_of_preflight:flipped"}}, "reward update", "red"),
    "temperature mismatch": ({"method": "ocrm", "weights__temperature": 0.7}, "temperatures", "yellow"),
    "no EOS in any response": ({"data__demonstrations": "HERE/long.jsonl"}, "EOS", "red"),
    "duplicates across splits": ({"data__valid": "HERE/again.jsonl"}, "duplicates", "red"),
    "constant reward model": ({"gold__kind": "function", "gold__source": "own_of_preflight:constant"}, "gold", "red"),
    "all responses cut": ({"data__limits__max_response_length": 3}, "lengths", "red"),
    "NaN weight": ({"model__source": "HERE/nan"}, "weights", "red"),
    "non-unit embeddings": ({"method": "frft", "encoder__source": "HERE/encoder", "encoder__backend": "flax"}, "embeddings", "red"),
    "stale column": ({"method": "ocrm", "row": {"reward_update": "own_of_preflight:stale"}}, "reward update", "red"),
    "prompt over the context": ({"model__source": "HERE/model", "data__limits__max_prompt_length": 60}, "settings", "red"),
    "user loss with a wrong field": ({"reward__loss": "own_of_preflight:field"}, "every step traced", "red"),
    "missing judge package": ({}, "judge", "red"),
    "batch that does not divide": ({"method": "rloo", "ppo__rloo_k": 3}, "settings", "red"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault, found, monkeypatch):
    changes, name, colour = PLANTED[fault]
    arguments = ["--judge", "some-model"] if fault == "missing judge package" else []
    if arguments:
        monkeypatch.setitem(sys.modules, "openai", None)
    if fault == "non-unit embeddings":
        opened = models.open_encoder

        def twice(*given, **how):
            encoder = opened(*given, **how)
            return encoder._replace(embed=lambda texts, progress: 2 * encoder.embed(texts, progress))

        monkeypatch.setattr(models, "open_encoder", twice)
    status, said = found(changes, *arguments)
    assert said[name] == colour, said
    assert status == ("red" in said.values())
