"""The memory of activations by formula: what a program holds at its peak beside its arguments and results.

What is counted is what XLA's compiler for CPUs keeps: every array of a layer that the backward pass reads, in the precision in which it is
held. Compilers of accelerators fuse more and keep less, so that this is an upper bound there.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxrlhf.models.model import LOGITS_AT_ONCE
from jaxrlhf.plan.planner import Read

# Arrays of the MLP's inner width that wait for the backward pass: (in float32; in bfloat16: in bfloat16, in float32). GELU's are its
# input, the value and the pieces of its derivative; those of a gated MLP the gate, its sigmoid and value, the other side and the product.
_INNER = {"gelu": (5, 2, 1), "gelu_tanh": (3, 4, 1), "silu": (3, 3, 1)}
_GATE = (2, 1, 0)  # more, where there is a gate


class Sizes(NamedTuple):
    """Bytes of the arrays of one layer of a read, and of its head, in float32, on one device."""

    hidden: float  # a number for every position and feature
    out: float  # the same of the positions that come out: the last layer computes those that are read
    queries: float
    keys: float  # of keys, and as many of values
    inner: float  # the MLP's inner width
    scores: float  # a number for every head, query and key
    mask: float  # what is added to the scores, without heads
    kernels: float  # the matrices of one layer
    table: float  # embedding, or lm head
    logits: float  # as many as are held at a time

    def low(self, read: Read) -> float:
        """The share that is left of an array in the read's precision."""
        return 0.5 if read.dtype == "bfloat16" else 1.0


def sizes(read: Read, tensor: int = 1, *, last: bool = False) -> Sizes:
    """Attention, the MLP and the vocabulary are cut over `tensor` devices, hidden states are not. `last`: of the last layer."""
    c, positions = read.model, 4.0 * read.rows * read.width
    outputs = 4.0 * read.rows * (read.outputs if last else read.width)
    return Sizes(
        hidden=positions * c.hidden_size,
        out=outputs * c.hidden_size,
        queries=outputs * c.num_heads * c.head_dim / tensor,
        keys=positions * c.num_kv_heads * c.head_dim / tensor,
        inner=outputs * c.intermediate_size / tensor,
        scores=outputs * c.num_heads * read.width / tensor,
        mask=positions * read.width,
        kernels=4.0 * kernel_parameters(read) / tensor,
        table=4.0 * c.vocab_size * c.hidden_size / tensor,
        logits=4.0 * read.rows * logits_at_once(read) * c.vocab_size / tensor,
    )


def kernel_parameters(read: Read) -> int:
    """Parameters of the matrices of one layer."""
    c = read.model
    attention = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    return attention + c.hidden_size * c.intermediate_size * (3 if c.gated_mlp else 2)


def logits_at_once(read: Read) -> int:
    """Positions whose logits exist at a time, as `model.chunked_stats` cuts them."""
    if read.decoded or read.head != "lm":
        return 1 if read.decoded else 0
    chunk = read.chunk or max(1, LOGITS_AT_ONCE // (read.rows * read.model.vocab_size))
    return read.outputs if chunk >= read.outputs else math.ceil(read.outputs / math.ceil(read.outputs / chunk))


def layer(read: Read, size: Sizes) -> float:
    """Everything one layer computes that its backward pass reads.

    Two norms: the input over its deviation, the scale spread over the positions, the result; of a LayerNorm before attention the input
    less its mean. Attention: queries, keys, values, three arrays of scores (less the largest, spread sums, weights), the mixed values. The
    residual stream after each part (of parallel parts once). The MLP by its activation.
    """
    c = read.model
    norms = (3 if c.norm == "rmsnorm" else 4) * size.hidden + 3 * size.out
    stream = (1 if c.parallel_residual else 2) * size.out
    attention = 2 * size.queries + 2 * size.keys + 3 * size.scores
    return norms + stream + attention + inner(read, size)


def inner(read: Read, size: Sizes) -> float:
    """The MLP's part of `layer`."""
    whole, low, high = (a + b * read.model.gated_mlp for a, b in zip(_INNER[read.model.activation], _GATE, strict=True))
    return size.inner * (high + 0.5 * low if read.dtype == "bfloat16" else whole)


def kept(read: Read, size: Sizes) -> float:
    """What stays of one layer until its backward pass, by `remat`: all; the results of products with a kernel that a later one reads, and
    the layer's input; the input alone."""
    c = read.model
    if read.remat == "none":
        return layer(read, size)
    inputs = size.hidden
    if read.remat == "dots":
        inputs += size.queries + 2 * size.keys + (1 + c.gated_mlp) * size.inner + (0 if c.parallel_residual else size.out)
    return inputs * size.low(read)


def head(read: Read, size: Sizes) -> float:
    """The final norm, and the logits five times: less the largest, their exponentials, the gradient of the chosen ones, of all, and that
    transposed for its product. A chunk of logits is computed again in the backward pass, and so holds no more."""
    return 3 * size.out + 5 * size.logits


def backward(read: Read, size: Sizes) -> float:
    """One layer while its gradient is computed, beside what is `kept` of the others: all its arrays (computed again under `remat`), and
    the gradient of the MLP's inner array (of a gated one, of both sides too, in two layouts) or those of the scores, whichever is more; the
    gradient of its result, in two layouts, in place of that result."""
    whole, gated = layer(read, size), read.model.gated_mlp
    mlp = (
        whole + (1 + 3 * gated * size.low(read)) * size.inner - (2 * size.scores if read.remat == "dots" and read.dtype == "float32" else 0)
    )
    attention = whole - inner(read, size) + 2 * size.scores
    return max(mlp, attention) + size.out


def training(reads: Sequence[Read], gradients: float, tensor: int = 1) -> float:
    """The peak of a step: at a head, where everything waits for the backward pass; at the last layer of a read or the one before it. Two
    models in one loss wait for each other. A gradient goes into the optimizer as soon as it is there; but where their norm is clipped all
    wait for it, and each is scaled; and microbatches add theirs to a sum that is there throughout."""
    accumulates, clips = any(read.times > read.updates for read in reads), any(read.clips for read in reads)
    scores = sum(again(read, sizes(read, tensor)) for read in reads)
    waiting, steady, moments, ends = 0.0, gradients if accumulates else 0.0, [], []
    for read in reads:
        size, last, layers = sizes(read, tensor), sizes(read, tensor, last=True), read.model.num_layers
        one, of_last = kept(read, size), kept(read, last)
        whole = backward(read, size) + scores - again(read, size)
        waiting += one * (layers - 1) + of_last + copies(read, size)
        steady += size.hidden + size.table * ((not accumulates) + (read.head == "lm")) + (size.mask if read.remat != "none" else 0.0)
        moments += [head(read, last), backward(read, last) - of_last]
        if layers > 1:
            moments.append(whole - of_last - one)
        if clips and not accumulates:
            ends.append(whole + max(gradients - size.table - size.kernels, 0.0))
    return max(steady + max([waiting + max(moments), *ends]), 2 * gradients * clips)


def again(read: Read, size: Sizes) -> float:
    """What is there of a layer of one model while the other's gradient is computed: scores that were computed again. A layer whose parts
    are parallel takes its MLP first."""
    return 3 * size.scores if read.remat == "full" and not read.model.parallel_residual else 0.0


def copies(read: Read, size: Sizes) -> float:
    """Kernels in another precision or layout: of one layer; in bfloat16 of all that wait for the backward pass, and of all, in both, where
    they are made once for many microbatches. Gathered ones wait for the backward pass."""
    layers = read.model.num_layers
    if read.dtype != "bfloat16":
        return size.kernels * (layers if read.gathered else 1)
    if read.times > read.updates:
        return 2 * layers * size.kernels
    return size.kernels * (layers if read.remat == "none" else 1)


def forward(read: Read, tensor: int = 1) -> float:
    """The peak of a pass without gradients: one layer in its attention (queries, keys, values, their mix, three arrays of scores) or in its
    MLP, with the residual stream and what a norm makes of it; or the head, its logits three times; and the cache where one is made."""
    size = sizes(read, tensor)
    attention = 2 * size.queries + 2 * size.keys + 3 * size.scores
    mlp = (2 + read.model.gated_mlp) * size.inner
    stream = 3 * size.hidden + size.mask
    copies = size.kernels * (read.model.num_layers if read.dtype == "bfloat16" else 1)
    return max(stream + max(attention, mlp), 3 * size.logits) + copies + read.cache / tensor
