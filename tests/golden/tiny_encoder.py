"""Tiny random BERT and RoBERTa sentence encoders, as folders that sentence-transformers and `load_encoder` open. No torch here.

    write_tiny_bert(folder, ["good", "bad"])      words → one token each, anything else → its characters
    write_tiny_roberta(folder)                    one token a byte

Weights follow from (seed, tensor name) alone, so a golden needs no weights. Word embeddings outweigh the rest: texts that share words
have similar vectors.
"""

import json
import string
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

GOLDEN = Path(__file__).with_name("encoder.json")
LABELS = {"0": "contradiction", "1": "entailment", "2": "neutral"}
WORDS = ("good", "bad", "red", "the", "answer", "is")
# Empty, one token, words and characters, over-long, not ASCII, spaces at the ends, punctuation.
TEXTS = ("", "good", "The answer is good, zebra!", "red bad " * 60, "naïve Ωmega 你好 🙂", "  the good\n", "is?")
PAIRS = (("the answer is good", "is good"), ("", "red"), ("bad " * 80, "the answer"), ("naïve", "你好 " * 50))
_POOLING = "pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens"


def write_tiny_bert(folder, words=(), *, seed=0, pooling="mean", max_length=32, classifier=False, prefix="", layout=True, **config):
    """A BERT of 32 dimensions and 2 layers whose tokenizer knows `words` (lower case); the folder.

    `classifier`: BertForSequenceClassification with LABELS. `prefix` goes before the encoder's tensor names ("bert."). `layout`: write
    the files of sentence-transformers too (pooling, max_length, normalisation). `config` overrides fields of config.json.
    """
    characters = string.ascii_lowercase + string.digits + string.punctuation
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *("##" + c for c in characters)]
    vocab += [word for word in dict.fromkeys(w.lower() for w in words) if word not in vocab]
    ids = {token: n for n, token in enumerate(vocab)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))  # type: ignore[call-arg]
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    hf = {
        "model_type": "bert",
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    } | config
    names = encoder_shapes(hf, prefix)
    if classifier:
        names |= {f"{prefix}pooler.dense.weight": (hf["hidden_size"],) * 2, f"{prefix}pooler.dense.bias": (hf["hidden_size"],)}
        names |= {"classifier.weight": (len(LABELS), hf["hidden_size"]), "classifier.bias": (len(LABELS),)}
        hf |= {"architectures": ["BertForSequenceClassification"]}
    return _write(Path(folder), hf, names, backend, specials, seed, pooling, max_length, classifier, layout)


def write_tiny_roberta(folder, *, seed=0, pooling="mean", max_length=48, classifier=False, prefix="", layout=True, **config):
    """A RoBERTa of 32 dimensions and 2 layers whose tokens are bytes; otherwise as `write_tiny_bert`. The padding id is 1."""
    vocab = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(vocab)}, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    specials = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    hf = {
        "model_type": "roberta",
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 66,
        "type_vocab_size": 1,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    } | config
    names = encoder_shapes(hf, prefix)
    if classifier:
        names |= {"classifier.dense.weight": (hf["hidden_size"],) * 2, "classifier.dense.bias": (hf["hidden_size"],)}
        names |= {"classifier.out_proj.weight": (len(LABELS), hf["hidden_size"]), "classifier.out_proj.bias": (len(LABELS),)}
        hf |= {"architectures": ["RobertaForSequenceClassification"]}
    return _write(Path(folder), hf, names, backend, specials, seed, pooling, max_length, classifier, layout)


def encoder_shapes(hf, prefix=""):
    """Tensor name → shape of an encoder without pooler, as transformers writes it."""
    d, inner = hf["hidden_size"], hf["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (hf["vocab_size"], d),
        "embeddings.position_embeddings.weight": (hf["max_position_embeddings"], d),
        "embeddings.token_type_embeddings.weight": (hf["type_vocab_size"], d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
    }
    for n in range(hf["num_hidden_layers"]):
        at = f"encoder.layer.{n}"
        linear = {f"attention.self.{part}": (d, d) for part in ("query", "key", "value")}
        linear |= {"attention.output.dense": (d, d), "intermediate.dense": (inner, d), "output.dense": (d, inner)}
        for name, shape in linear.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{at}.{name}.weight": (d,), f"{at}.{name}.bias": (d,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def tensor(name, shape, seed=0):
    """The weights of one tensor, from its name without the model's prefix."""
    bare = name.removeprefix("bert.").removeprefix("roberta.")
    noise = np.random.RandomState([seed, zlib.crc32(bare.encode())]).standard_normal(shape).astype(np.float32)
    if "LayerNorm.weight" in bare:
        return 1 + 0.2 * noise
    return noise if "word_embeddings" in bare else 0.2 * noise


def _write(folder, hf, shapes, backend, specials, seed, pooling, max_length, classifier, layout):
    folder.mkdir(parents=True, exist_ok=True)
    hf = {"architectures": [{"bert": "BertModel", "roberta": "RobertaModel"}.get(hf["model_type"])], "initializer_range": 0.02, **hf}
    if classifier:
        hf |= {"id2label": LABELS, "label2id": {label: int(n) for n, label in LABELS.items()}}
    _json(folder / "config.json", hf)
    save_file({name: tensor(name, shape, seed) for name, shape in shapes.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    backend.add_special_tokens(list(specials.values()))
    backend.save(str(folder / "tokenizer.json"))
    positions = hf["max_position_embeddings"] - (hf["pad_token_id"] + 1 if hf["model_type"] != "bert" else 0)
    _json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions, **specials})
    if layout and not classifier:
        modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
        kinds = [{"idx": n, "name": str(n), "path": p, "type": f"sentence_transformers.models.{k}"} for n, (k, p) in enumerate(modules)]
        _json(folder / "modules.json", kinds)
        _json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
        (folder / "1_Pooling").mkdir(exist_ok=True)
        modes = {mode: f"_{pooling}_t" in mode for mode in _POOLING}
        _json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": hf["hidden_size"], **modes})
    return folder


def _json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# name → how to write the folder
ENCODERS = {
    "bert-mean": lambda folder: write_tiny_bert(folder, WORDS),
    "bert-cls": lambda folder: write_tiny_bert(folder, WORDS, pooling="cls", prefix="bert.", hidden_act="gelu_new", seed=1),
    "roberta-mean": lambda folder: write_tiny_roberta(folder),
    "roberta-cls": lambda folder: write_tiny_roberta(folder, pooling="cls", prefix="roberta."),
    "xlm-roberta": lambda folder: write_tiny_roberta(folder, model_type="xlm-roberta", max_length=20, seed=2),
    "bert-plain": lambda folder: write_tiny_bert(folder, WORDS, layout=False),
}
CLASSIFIERS = {
    "bert": lambda folder: write_tiny_bert(folder, WORDS, classifier=True, prefix="bert."),
    "roberta": lambda folder: write_tiny_roberta(folder, classifier=True, prefix="roberta."),
}
