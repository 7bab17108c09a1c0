"""Bytes that a program moves in a device's memory and sends to other devices, by formula: orders of magnitude, for what bounds what."""

from collections.abc import Mapping

from jaxrlhf.plan.formulas.activations import Sizes, layer
from jaxrlhf.plan.planner import Read


def moved(read: Read, size: Sizes, learned: float) -> float:
    """Every array of a layer is written once and read once, and in the backward pass its gradient is, and it is read and computed from
    again: three times as much. So are logits. Kernels are read once a pass; a decoded token reads them and the whole cache. An optimizer
    step reads parameters, two moments and gradients and writes the first three: 7 times what learns; a microbatch adds its gradients."""
    c, low = read.model, size.low(read)
    passes = 3 if read.learns else 1
    again = 1 if read.learns and read.remat != "none" else 0
    kernels = low * (c.num_layers * size.kernels + (size.table if read.head == "lm" else 0))
    arrays = 2 * c.num_layers * layer(read, size)
    logits = 4.0 * read.rows * read.outputs * c.vocab_size * 2 if read.head == "lm" else 0.0
    one = (passes + again) * (arrays + kernels) + passes * logits
    if read.decoded:
        one += (read.decoded - 1) * (kernels + read.cache)
    steps = read.updates * 7 * learned + (3 * learned * read.times if read.learns and read.times > read.updates else 0)
    return read.times * one + steps


def sent(read: Read, size: Sizes, axes: Mapping[str, int], learned: float) -> float:
    """What one device sends, where a sum over n devices is 2 (n − 1) / n of the array and a gather or a scatter half of that.

    fsdp: the parameters, in the precision of the computation, are gathered once a pass and once a decoded token, again where `remat`
    computes layers again; the gradients of a microbatch are scattered. data: the gradients of an optimizer step are summed. tensor: the
    results of attention and MLP are summed in every layer, their gradients too. `learned`: bytes of all gradients, in float32.
    """
    c, low = read.model, size.low(read)
    parameters = c.num_layers * size.kernels + size.table * (1 + (read.head == "lm" and not c.tied_head))
    data, fsdp, tensor = (axes[name] for name in ("data", "fsdp", "tensor"))
    total = 0.0
    if fsdp > 1:
        gathers = 1 + (read.learns and read.remat != "none") + max(read.decoded - 1, 0)
        total += read.times * (fsdp - 1) / fsdp * (gathers * low * parameters + (learned / tensor if read.learns else 0))
    if data > 1 and read.learns:
        total += read.updates * 2 * (data - 1) / data * learned / (fsdp * tensor)
    if tensor > 1:
        sums = 2 * c.num_layers * low * size.hidden * (2 if read.learns else 1) * (1 + read.decoded / read.width)
        total += read.times * 2 * (tensor - 1) / tensor * sums
    return total
