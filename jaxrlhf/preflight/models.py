"""Checks of the models by real passes over a few rows: what they say must not depend on padding, batch mates or the way of asking."""

from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms.reward_update import encoder_options
from jaxrlhf.algorithms.rounds import SECTIONS_READ
from jaxrlhf.data.batches import take
from jaxrlhf.data.tokens import pad_id_of, tokenizer_fingerprint
from jaxrlhf.models.hub import eos_ids, tokenizer_named
from jaxrlhf.offline.encoder_identity import encoder_identity
from jaxrlhf.offline.encoders import open_encoder
from jaxrlhf.plan.compile import ON_CPU
from jaxrlhf.preflight.screen import GREEN, RED, YELLOW, Found
from jaxrlhf.preflight.subject import Subject
from jaxrlhf.steps.pair import response_scores
from jaxrlhf.types import TextBatch

ALLOWED = 1e-3  # by how much two ways of one sum in float32 may differ, as a share of 1 + its size; rounding is a hundredth of that
WIDER = 5  # columns of padding more, on each side


def compiled(function: Any, *arguments: Any) -> Any:
    """The function for such arguments; on a CPU compiled with little effort, for it runs once or twice."""
    options: Any = ON_CPU if jax.default_backend() == "cpu" else None
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)


def weights(subject: Subject) -> Found:
    """Every parameter is finite: what is read is held to that, by name."""
    return Found(GREEN, f"{sum(leaf.size for leaf in jax.tree.leaves(subject.policy.params)):,} parameters, all finite")


def tokenizer(subject: Subject) -> Found:
    """Whether a response can end, and whether policy and gold model read the ids that they were trained with."""
    config, given, ends = subject.config, subject.tokenizer, eos_ids(subject.policy)
    figure = f"{len(given):,} ids, EOS {', '.join(map(str, ends))}" + (" = PAD" if pad_id_of(given) in ends else "")
    if not ends or max(ends) >= len(given):
        return Found(RED, figure, "no id of the tokenizer ends a response: give it an EOS that it has")
    sources = {"model": config.model.source, "gold": config.gold.source if config.gold.kind == "model" else None}
    own = {name: tokenizer_named(source) for name, source in sources.items() if source is not None}
    other = [name for name, one in own.items() if one is not None and tokenizer_fingerprint(one) != tokenizer_fingerprint(given)]
    if "gold" in other:
        figure += "; gold's tokenizer is another: text is tokenised again for it"
    if "model" in other:
        return Found(
            YELLOW, figure, "tokenizer.source is another than the model was trained with: leave it out, unless it is the same model's"
        )
    return Found(GREEN, figure)


def layout(table: Any) -> str:
    """What is wrong with the padding of a table; "" where prompts are padded on the left and responses on the right."""
    for one in fields(table):
        mask = np.asarray(getattr(table, one.name)) if one.name.endswith(("mask_BL", "mask_BT")) else np.zeros((1, 1), bool)
        mask = mask if one.name.endswith("BL") else mask[:, ::-1]
        if (mask[:, :-1] & ~mask[:, 1:]).any():
            return f"{one.name} of row {np.flatnonzero((mask[:, :-1] & ~mask[:, 1:]).any(axis=1))[0]} is not padded on its side"
    return ""


def widened(table: Any) -> Any:
    """The table with more padding, other ids under all of it, and rows that only fill the batch; it means the same."""

    def wide(name: str, mask: Any, x: Any) -> Any:
        x = np.asarray(x)
        if mask is not None and x.dtype == np.int32:
            x = np.where(mask, x, np.where(x > 0, x - 1, 1))
        if name.endswith(("_BL", "_BT")):
            sides = (WIDER, 0) if name.endswith("_BL") else (0, WIDER)
            x = np.pad(x, ((0, 0), sides), constant_values=False if x.dtype == bool else 1)
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
    policy, reward, table = subject.policy, subject.reward, subject.few_texts

    def both(params: Any, one: TextBatch) -> Any:
        sides = one.prompt_BL, one.prompt_mask_BL, one.response_BT, one.response_mask_BT
        tokens, mask = (jnp.concatenate(two, axis=1) for two in (sides[::2], sides[1::2]))
        stats = policy.model.score_tokens(params[0], tokens, mask, start=one.prompt_BL.shape[1])
        logps_B = jnp.sum(jnp.where(one.response_mask_BT, stats.logp_BT, 0.0), axis=1)
        return jnp.stack([logps_B, response_scores(reward.model, params[1], *sides)])

    params = policy.params, reward.params
    n, half = len(table.index_B), max(len(table.index_B) // 2, 1)
    ways = table, widened(table), take(table, np.arange(half))
    whole, wide, alone = (np.asarray(compiled(both, params, one)(params, one))[:, :n] for one in ways)
    compared = {"padding": (whole, wide), "batch mates": (whole[:, :half], alone)}
    return same(compared, f"log-probs and scores of {n} rows", "the model reads what its mask hides")


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
    return Found(GREEN, figure)


def embeddings(subject: Subject) -> Found | None:
    """Vectors of unit length."""
    section = subject.config.encoder
    if "encoder" not in SECTIONS_READ.get(subject.method.reward_update or "", ()) or subject.config.synthesize.nli is not None:
        return None
    encoder = open_encoder(encoder_identity(**encoder_options(section)), pooling=section.pooling, batch_size=4, mesh=subject.mesh)
    vectors = encoder.embed([d.response for d in subject.demonstrations[0][:4]], None)
    off = float(np.max(np.abs(np.linalg.norm(vectors, axis=1) - 1)))
    advice = "" if off < 1e-3 else "cosines are taken as products of unit vectors: the encoder has to normalise"
    return Found(RED if advice else GREEN, f"{len(vectors)} texts: length 1 ± {off:.1e}", advice)
