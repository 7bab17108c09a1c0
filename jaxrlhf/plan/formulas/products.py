"""FLOPs of products of matrices by formula: two for every multiplication and addition, as the compiled program has them."""

from jaxrlhf.plan.formulas.activations import logits_at_once
from jaxrlhf.plan.planner import Read


def products(read: Read) -> float:
    """FLOPs of all passes of a read in one call: forward, backward where it learns, tokens decoded afterwards."""
    c = read.model
    layers = [read.width] * (c.num_layers - 1) + [read.outputs]  # the last layer computes the positions that are read
    one = sum(_layer(read, queries) for queries in layers) + _head(read)
    if read.learns:
        one += sum(_backward(read, queries) for queries in layers) + 2 * _head(read)
        if 0 < logits_at_once(read) < read.outputs:
            one += _head(read)  # a chunk of logits is computed again for its gradient
    if read.decoded:
        one += (read.decoded - 1) * _decoded(read)
    return float(read.times * one)


def _layer(read: Read, queries: int) -> int:
    """Keys and values of all positions, everything else of the queries."""
    return _keys(read) + _queries(read, queries) + _attention(read, queries) + _out(read, queries) + _mlp(read, queries)


def _backward(read: Read, queries: int) -> int:
    """Two products for every one of the forward pass: the gradients of its input and of its kernel (of adapters the input's alone, and the
    thin products beside it); before them what `remat` computes again: scores and mixed values, or all that a gradient reads, which the
    layer's last product is not."""
    c = read.model
    again = 0
    if read.remat == "dots":
        again = _attention(read, queries)
    elif read.remat == "full":
        again = _layer(read, queries) - _down(read, queries) - (_out(read, queries) if c.parallel_residual else 0)
    kernels = _keys(read) + _queries(read, queries) + _out(read, queries) + _mlp(read, queries)
    return again + 2 * _attention(read, queries) + (kernels + 3 * _adapters(read, queries) if read.adapters else 2 * kernels)


def _keys(read: Read) -> int:
    c = read.model
    return 2 * read.rows * read.width * c.hidden_size * 2 * c.num_kv_heads * c.head_dim


def _queries(read: Read, queries: int) -> int:
    c = read.model
    return 2 * read.rows * queries * c.hidden_size * c.num_heads * c.head_dim


def _out(read: Read, queries: int) -> int:
    return _queries(read, queries)  # the same two sides


def _attention(read: Read, queries: int) -> int:
    """Queries with keys, and weights with values: whole rows, what is masked too."""
    c = read.model
    return 2 * 2 * read.rows * queries * read.width * c.num_heads * c.head_dim


def _down(read: Read, queries: int) -> int:
    c = read.model
    return 2 * read.rows * queries * c.hidden_size * c.intermediate_size


def _mlp(read: Read, queries: int) -> int:
    return (3 if read.model.gated_mlp else 2) * _down(read, queries)


def _adapters(read: Read, queries: int) -> int:
    """The two thin products beside every kernel of a layer."""
    c = read.model
    heads = c.head_dim * (c.num_heads + c.num_kv_heads)
    sides = 2 * (2 * c.hidden_size + heads) + (3 if c.gated_mlp else 2) * (c.hidden_size + c.intermediate_size)
    return 2 * read.rows * queries * read.adapters * sides


def _head(read: Read) -> int:
    c = read.model
    return 2 * read.rows * read.outputs * c.hidden_size * {"lm": c.vocab_size, "scalar": 1, "none": 0}[read.head]


def _decoded(read: Read) -> int:
    """One token of every row: the kernels once, attention over all slots of the cache, filled or not, and the head."""
    c = read.model
    slots, token = read.width + read.decoded, Read(c, read.head, read.rows, 1, 1)
    attention = 2 * 2 * read.rows * slots * c.num_heads * c.head_dim
    return c.num_layers * (_layer(token, 1) - _attention(token, 1) + attention) + _head(token)
