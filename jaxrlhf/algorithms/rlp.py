"""RLP-SPG."""

from jaxrlhf.algorithms.update import Pairs, RoundContext


def synthetic(context: RoundContext, pairs: Pairs):
    raise NotImplementedError
