"""Writes encoder.json: vectors of the tiny encoders by sentence-transformers, logits of the tiny classifiers by transformers.

python tests/golden/make_encoder.py        (an environment with torch and sentence-transformers)
"""

import json
import tempfile
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from tiny_encoder import CLASSIFIERS, ENCODERS, GOLDEN, PAIRS, TEXTS
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def rounded(array):
    return [[float(f"{value:.7g}") for value in row] for row in array.tolist()]


def vectors_of(folder):
    return rounded(SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS), normalize_embeddings=True, batch_size=3))


@torch.no_grad()
def logits_of(folder):
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    first, second = (list(side) for side in zip(*PAIRS, strict=True))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    types = model.config.type_vocab_size > 1
    inputs = tokenizer(first, second, padding=True, truncation=True, max_length=40, return_tensors="pt", return_token_type_ids=types)
    return rounded(model.eval()(**inputs).logits.numpy())


def main():
    with tempfile.TemporaryDirectory() as work:
        vectors = {name: vectors_of(write(Path(work) / name)) for name, write in ENCODERS.items()}
        logits = {name: logits_of(write(Path(work) / f"{name}-classifier")) for name, write in CLASSIFIERS.items()}
    GOLDEN.write_text(json.dumps({"vectors": vectors, "logits": logits}) + "\n")


if __name__ == "__main__":
    main()
