"""Text → unit vectors by a sentence encoder.

`embed_texts` computes; `jaxrlhf.offline.vectors.embed_cached` computes what is not on disk yet.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrlhf.offline.encoder_identity import encoder_identity
from jaxrlhf.offline.encoders import check_texts, open_encoder
from jaxrlhf.types import Progress


def embed_texts(
    texts: Sequence[str], *, batch_size: int = 64, mesh: Any = None, progress: Progress | None = None, **encoder: Any
) -> np.ndarray:
    """Unit vectors float32 [N, D] of texts, in their order.

    encoder: keywords of `encoder_identity`. mesh: where it runs (flax only). progress: called with (texts done, of all), from (0, all) on.

    An empty text has a vector too, that of the special tokens. ValueError: a lone surrogate in a text, or a text that has no token.
    """
    check_texts(texts)
    identity = encoder_identity(**encoder)
    return open_encoder(identity, pooling=encoder.get("pooling"), batch_size=batch_size, mesh=mesh).embed(texts, progress)
