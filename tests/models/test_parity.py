"""Live against torch and transformers, both directions: `make parity`. The goldens of test_golden.py are the same comparison, stored."""

import json

import jax
import numpy as np
import pytest
import tiny_models
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from jaxrlhf import models

pytestmark = pytest.mark.parity
NAMES = list(tiny_models.VARIANTS)


@pytest.fixture(scope="module")
def hf():
    pytest.importorskip("torch", reason="parity tests need torch: install the parity extra")
    import transformers

    return transformers


def torch_forward(model, side):
    import torch

    tokens, mask = tiny_models.padded(side)
    mask = torch.from_numpy(mask).long()
    with torch.no_grad():
        outputs = model(input_ids=torch.from_numpy(tokens).long(), attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    return outputs.logits.float().numpy()


def assert_logits_agree(model, loaded):
    apply = jax.jit(loaded.model.apply)
    for side in ("left", "right"):
        tokens, mask = tiny_models.padded(side)
        expected = torch_forward(model, side)[mask]
        ours = np.asarray(apply(loaded.params, tokens, mask).logits)[mask]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def config_of(hf, name, path, **changes):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**tiny_models.VARIANTS[name], "initializer_range": 0.3, **changes}))
    return hf.AutoConfig.from_pretrained(path)


def regenerated(name, head, path, **changes):
    """A tiny model with the weights of the goldens, loaded here."""
    shapes = json.loads(tiny_models.GOLDEN.read_text())["models"][name]["shapes"][head]
    return models.load(tiny_models.write_folder(path / "regenerated", {**tiny_models.VARIANTS[name], **changes}, shapes), head=head)


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_saves_loads_here(hf, name, tmp_path):
    import torch

    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config_of(hf, name, tmp_path / "config")).eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="9KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert_logits_agree(model, models.load(tmp_path / "theirs"))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_here_opens_in_transformers(hf, name, tmp_path):
    loaded = regenerated(name, "lm", tmp_path)
    models.save(loaded, tmp_path / "ours", max_shard_bytes=9_000)
    model, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_logits_agree(model.eval(), loaded)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"])
def test_a_model_from_a_shape_opens_in_transformers(hf, family, tmp_path):
    shape = {"family": family, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    config, _ = models.config_from_shape(shape, 29, max_positions=64, pad_id=0, bos_id=1, eos_id=1)
    loaded = models.initialise(config, key=jax.random.key(0))
    models.save(loaded, tmp_path / "ours")
    assert_logits_agree(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval(), loaded)


@pytest.mark.parametrize("name", NAMES)
def test_reward_is_the_logit_less_the_bias_on_ragged_rows(hf, name, tmp_path):
    """A model whose vocabulary is full and whose pad is EOS: the exported folder has a row more, and pads with it."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({f"w{n}": n for n in range(29)}, unk_token="w2"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w1")
    loaded = regenerated(name, "scalar", tmp_path, pad_token_id=tiny_models.EOS)._replace(tokenizer=tokenizer)
    models.save(models.with_reward_bias(loaded, 0.75), tmp_path / "reward")

    model, report = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.num_labels == 1 and model.config.vocab_size == 30
    # Texts that end in EOS: were EOS the pad, transformers would read the token before it.
    texts = [" ".join(f"w{token}" for token in [*row, tiny_models.EOS]) for row in tiny_models.ROWS]
    encoded = hf.AutoTokenizer.from_pretrained(tmp_path / "reward", padding_side="right")(texts, padding=True, return_tensors="pt")
    theirs = model.eval()(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[:, 0].detach().numpy()
    theirs = theirs - model.config.reward_bias

    again = models.load(tmp_path / "reward", head="scalar")
    mask = encoded["attention_mask"].numpy().astype(bool)
    scalars = np.asarray(jax.jit(again.model.apply)(again.params, encoded["input_ids"].numpy(), mask).scalars)
    ours = scalars[np.arange(len(texts)), mask.sum(1) - 1] - models.reward_bias(again)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_bfloat16_files_of_transformers(hf, tmp_path):
    import torch

    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config_of(hf, "llama-3.1-rope", tmp_path / "config")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs/config.json").read_text())["dtype"] == "bfloat16"
    loaded = models.load(tmp_path / "theirs")
    # The same rounded weights, computed in float32 by both. (model.float() would keep torch's rounded rotary frequencies.)
    assert_logits_agree(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval(), loaded)
    models.save(loaded, tmp_path / "ours")
    reopened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert reopened.dtype == torch.float32, "the folder says what it holds"
