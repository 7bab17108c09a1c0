"""Checks of the models by real passes over a few rows: what they say must not depend on padding, batch mates or the way of asking."""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms.reward_update import encoder_options
from jaxrlhf.algorithms.rounds import SECTIONS_READ
from jaxrlhf.data.batches import take
from jaxrlhf.data.pairs import Demonstration
from jaxrlhf.data.tokens import eos_ids_of, pad_id_of, retokenize_responses, tokenizer_fingerprint
from jaxrlhf.models.hub import Loaded, eos_ids, tokenizer_named
from jaxrlhf.offline.encoder_identity import encoder_identity
from jaxrlhf.offline.encoders import open_encoder
from jaxrlhf.pipeline import inputs
from jaxrlhf.plan.compile import ON_CPU
from jaxrlhf.preflight.screen import GREEN, RED, YELLOW, Found
from jaxrlhf.preflight.subject import ROWS, Subject
from jaxrlhf.steps.pair import response_scores
from jaxrlhf.types import Params, TextBatch

# A CPU's compiler tries hard, and these programs run once or twice: a third of the time.
QUICK: dict[str, Any] = ON_CPU | {
    "xla_llvm_disable_expensive_passes": True, "xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1
}  # fmt: skip
ALLOWED = 1e-3  # by how much two ways of one sum in float32 may differ, as a share of 1 + its size; rounding is a hundredth of that
WIDER = 5  # columns of padding more, on each side


def compiled(function: Any, *arguments: Any) -> Any:
    """The function for such arguments; on a CPU compiled with little effort, for it runs once or twice."""
    return jax.jit(function).lower(*arguments).compile(compiler_options=QUICK if jax.default_backend() == "cpu" else None)


def weights(subject: Subject) -> Found:
    """Every parameter is finite."""
    params = subject.policy.params
    fine = jax.device_get(jax.jit(partial(jax.tree.map, lambda leaf: jnp.isfinite(leaf).all()))(params))
    bad = [jax.tree_util.keystr(path, simple=True, separator="/") for path, ok in jax.tree_util.tree_leaves_with_path(fine) if not ok]
    n = sum(leaf.size for leaf in jax.tree.leaves(params))
    if bad:
        return Found(RED, f"{len(bad)} tensors are not finite: {', '.join(bad[:3])}", "the folder is damaged, or its training diverged")
    return Found(GREEN, f"{n:,} parameters, all finite")


def tokenizer(subject: Subject) -> Found:
    """Whether the model knows the ids of the tokenizer: its loss on the data against that of chance, and against its own tokenizer's."""
    config, policy, given = subject.config, subject.policy, subject.tokenizer
    ends = eos_ids(policy)
    figure = f"{len(given):,} ids, EOS {', '.join(map(str, ends))}" + (" = PAD" if pad_id_of(given) in ends else "")
    if not ends or max(ends) >= len(given):
        return Found(RED, figure, "no id of the tokenizer ends a response: give it an EOS that it has")
    if config.model.source is None:
        return Found(GREEN, f"{figure}; the model is new")
    rows, chance = [subject.demonstrations[0][i] for i in subject.texts[1].rows[:ROWS]], math.log(len(given))
    cost = nats_a_token(subject, given, rows)
    figure += f"; {cost:.2f} nats a token on {len(rows)} responses, chance is {chance:.2f}"
    own = tokenizer_named(config.model.source)
    if own is not None and tokenizer_fingerprint(own) != tokenizer_fingerprint(given):
        figure += f", with the model's own tokenizer {nats_a_token(subject, own, rows):.2f}"
        advice = "tokenizer.source is another than the model was trained with: leave it out"
        return Found(RED if not cost < nats_a_token(subject, own, rows) + 0.5 else YELLOW, figure, advice)
    if cost < chance:
        return Found(GREEN, figure)
    return Found(YELLOW, figure, "the model is no better than chance on this text: is it the tokenizer of its training?")


def nats_a_token(subject: Subject, tokenizer: Any, rows: Sequence[Demonstration]) -> float:
    """The model's loss on responses as the tokenizer spells them."""
    asked, limits = ([d.prompt for d in rows], [d.response for d in rows]), inputs.limits_of(subject.config)
    table, _ = retokenize_responses(*asked, tokenizer, limits, eos_ids=eos_ids_of(tokenizer), templated=rows[0].templated)
    arguments = subject.policy.params, table
    return -float(np.sum(compiled(partial(logps, subject.policy), *arguments)(*arguments)) / np.sum(table.response_mask_BT))


def logps(loaded: Loaded, params: Params, table: TextBatch) -> Any:
    """Log-probs of the responses under the mask [B]."""
    tokens = jnp.concatenate([table.prompt_BL, table.response_BT], axis=1)
    mask = jnp.concatenate([table.prompt_mask_BL, table.response_mask_BT], axis=1)
    stats = loaded.model.score_tokens(params, tokens, mask, start=table.prompt_BL.shape[1])
    return jnp.sum(jnp.where(table.response_mask_BT, stats.logp_BT, 0.0), axis=1)


def layout(table: Any) -> str:
    """What is wrong with the padding of a table; "" where prompts are padded on the left and responses on the right."""
    for one in fields(table):
        mask = np.asarray(getattr(table, one.name)) if one.name.endswith(("mask_BL", "mask_BT")) else np.zeros((1, 1), bool)
        mask = mask if one.name.endswith("BL") else mask[:, ::-1]
        if (mask[:, :-1] & ~mask[:, 1:]).any():
            return f"{one.name} of row {np.flatnonzero((mask[:, :-1] & ~mask[:, 1:]).any(axis=1))[0]} is not padded on its side"
    return ""


def widened(table: Any, fill: int = 1) -> Any:
    """The table with more padding, other ids under all of it, and rows that only fill the batch; it means the same."""

    def wide(name: str, mask: Any, x: Any) -> Any:
        x = np.asarray(x)
        if mask is not None and x.dtype == np.int32:
            x = np.where(mask, x, fill)
        if name.endswith(("_BL", "_BT")):
            sides = (WIDER, 0) if name.endswith("_BL") else (0, WIDER)
            x = np.pad(x, ((0, 0), sides), constant_values=False if x.dtype == bool else fill)
        return np.concatenate([x, x])

    masks = {"prompt_BL": "prompt_mask_BL", "response_BT": "response_mask_BT", "tokens_BT": "mask_BT"}
    masks |= {f"{side}_BT": f"{side}_mask_BT" for side in ("chosen", "rejected")}
    changes = {}
    for one in fields(table):
        value, mask = getattr(table, one.name), masks.get(one.name)
        mask = None if mask is None else np.asarray(getattr(table, mask))
        changes[one.name] = jax.tree.map(partial(wide, one.name, mask), value)  # columns are a dict
    live = np.arange(2 * len(table.row_mask_B)) < len(table.row_mask_B)
    return replace(table, **changes | {"row_mask_B": changes["row_mask_B"] & live})


def padding(subject: Subject) -> Found:
    """Log-probs and scores of a row: in the batch, with more padding, and with fewer batch mates."""
    if fault := layout(subject.few_texts):
        return Found(RED, fault, "prompts are padded on the left, responses on the right")
    policy, reward, table = subject.policy, subject.reward, subject.few_texts

    def both(params: Any, one: TextBatch) -> Any:
        sides = one.prompt_BL, one.prompt_mask_BL, one.response_BT, one.response_mask_BT
        return jnp.stack([logps(policy, params[0], one), response_scores(reward.model, params[1], *sides)])

    params = policy.params, reward.params
    n, half = len(table.index_B), max(len(table.index_B) // 2, 1)
    ways = table, widened(table), take(table, np.arange(half))
    whole, wide, alone = (np.asarray(compiled(both, params, one)(params, one))[:, :n] for one in ways)
    return same(
        {"padding": (whole, wide), "batch mates": (whole[:, :half], alone)},
        f"log-probs and scores of {n} rows", "the model reads what its mask hides",
    )  # fmt: skip


def same(pairs: dict[str, tuple[Any, Any]], what: str, advice: str) -> Found:
    """Whether each two arrays are the same but for rounding."""
    off = {name: float(np.max(np.abs(a - b) / (1 + np.abs(a)))) for name, (a, b) in pairs.items()}
    wrong = [name for name, value in off.items() if not value <= ALLOWED]
    figure = f"{what} change by {', '.join(f'{value:.1e} with {name}' for name, value in off.items())} (allowed {ALLOWED:g})"
    return Found(RED if wrong else GREEN, figure, f"{advice} ({', '.join(wrong)})" if wrong else "")


def rollout(subject: Subject) -> Found | None:
    """At the start the policy is its reference: KL 0, and the sampler's log-probs are those that training reads, ratio 1."""
    if subject.sampled is None:
        return None
    rollout, metrics, section = subject.sampled
    kl, off, ended = (float(metrics[f"rollout/{name}"]) for name in ("kl", "decode_mismatch", "eos_rate"))
    n, rows = int(np.sum(rollout.mask_BT)), len(rollout.row_mask_B)
    figure = (
        f"KL(policy, reference) {kl:.1e}, log-probs of sampling and training apart by {off:.1e} a token (n = {n}) at temperature "
        f"{section.temperature:g}; before SFT {round(ended * rows)} of {rows} responses end within {section.response_length} tokens"
    )
    if section.top_k or section.top_p < 1:
        return Found(YELLOW, figure, "ppo.top_k and ppo.top_p cut the distribution: every update is off-policy; 0 and 1 draw from all")
    if not np.max([abs(kl), off]) <= ALLOWED:
        spare = len(subject.policy.params["backbone"]["embed"]["embedding"]) - len(subject.tokenizer)
        if spare > 0:
            return Found(YELLOW, figure, f"{spare} rows of the embedding are no ids: they are never drawn, and training counts them")
        return Found(RED, figure, "sampling and training are at two temperatures, or read other tokens")
    if subject.config.sft.max_steps == 0 and not ended:
        return Found(YELLOW, figure, "sft.max_steps is 0 and nothing teaches it to stop: look at EOS and at ppo.response_length")
    return Found(GREEN, figure)


def embeddings(subject: Subject) -> Found | None:
    """Vectors of unit length, the same whatever text stands beside."""
    section = subject.config.encoder
    if "encoder" not in SECTIONS_READ.get(subject.method.reward_update or "", ()) or subject.config.synthesize.nli is not None:
        return None
    identity = encoder_identity(**encoder_options(section))
    texts = [d.response for d in subject.demonstrations[0][:4]]
    encoder = open_encoder(identity, pooling=section.pooling, batch_size=4, mesh=subject.mesh)
    vectors = encoder.embed([*texts, " ".join(texts)], None)
    return unit(vectors, np.concatenate([encoder.embed([text], None) for text in texts]))


def unit(vectors: np.ndarray, alone: np.ndarray) -> Found:
    """Vectors [n, D] of texts, and those of some of them embedded alone."""
    norms = np.linalg.norm(vectors, axis=1)
    off, apart = float(np.max(np.abs(norms - 1))), float(np.max(np.abs(vectors[: len(alone)] - alone)))
    figure = f"{len(vectors)} texts: length 1 ± {off:.1e}, alone or together the same within {apart:.1e}"
    if not off < 1e-3:
        return Found(RED, figure, "cosines are taken as products of unit vectors: the encoder has to normalise")
    return Found(GREEN if apart < 1e-2 else RED, figure, "" if apart < 1e-2 else "a vector depends on its batch mates")
