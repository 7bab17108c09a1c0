"""Send the leader's values to all processes, and wait for all processes. In a single process they do nothing."""

from __future__ import annotations

import itertools
import json
from base64 import b64decode, b64encode
from typing import TYPE_CHECKING, Any

from jaxrlhf.distributed.cluster import ProcessError
from jaxrlhf.distributed.membership import coordinator_client, count, index, is_leader

if TYPE_CHECKING:
    import numpy as np

PATIENCE_MS = 7 * 24 * 3600 * 1000  # one process may work alone for long; the heartbeat finds dead ones
_PIECE = 500_000  # characters of a value in one message
_ROWS = 16384  # of a table that are sent at a time

_numbers = itertools.count()  # numbers agreements and barriers, which all processes call in the same order


def agree(value: Any, what: str) -> Any:
    """The leader's `value` (any JSON value) in every process; what the others pass is ignored.

    All processes call it, in the same order. `what` names the call; ProcessError where a process is at another one.
    """
    if count() == 1:
        return value
    key, client = f"jaxrlhf/agree/{next(_numbers)}", coordinator_client()
    if is_leader():
        text = json.dumps({"what": what, "value": value}, ensure_ascii=True)
        pieces = [text[n : n + _PIECE] for n in range(0, len(text), _PIECE)]
        for n, piece in enumerate(pieces):
            client.key_value_set(f"{key}/{n}", piece)
        client.key_value_set(key, str(len(pieces)))
        return json.loads(text)["value"]
    pieces = int(client.blocking_key_value_get(key, PATIENCE_MS))
    told = json.loads("".join(client.blocking_key_value_get(f"{key}/{n}", PATIENCE_MS) for n in range(pieces)))
    if told["what"] != what:
        raise ProcessError(
            f"process {index()} is at {what!r} and process 0 at {told['what']!r}: they have diverged. Start all with the same "
            "command, config, code and data."
        )
    return told["value"]


def agree_on_columns(columns: dict[str, np.ndarray] | None, what: str) -> dict[str, np.ndarray]:
    """`agree` for arrays by name, bit by bit; the others pass None. For files on a disk that only the leader may see."""
    if count() == 1 and columns is not None:
        return columns
    import numpy as np

    packed = {name: (x.dtype.str, x.shape, b64encode(x.tobytes()).decode()) for name, x in (columns or {}).items()}
    told = agree(packed, what).items()
    return {name: np.frombuffer(b64decode(text), dtype).reshape(shape).copy() for name, (dtype, shape, text) in told}


def agree_on_rows(rows_ND: np.ndarray | None, what: str) -> np.ndarray:
    """The leader's float32 [N, D] in every process, for tables too large for `agree`: from device to device, in blocks of rows."""
    if count() == 1 and rows_ND is not None:
        return rows_ND
    import numpy as np
    from jax.experimental.multihost_utils import broadcast_one_to_all

    n, width = agree(None if rows_ND is None else list(rows_ND.shape), what)
    given = np.zeros((0, width), np.float32) if rows_ND is None else rows_ND
    blocks = []
    for start in range(0, n, _ROWS):
        block = np.zeros((min(_ROWS, n - start), width), np.float32)
        here = given[start : start + _ROWS]
        block[: len(here)] = here
        blocks.append(np.asarray(broadcast_one_to_all(block)))
    return np.concatenate([np.zeros((0, width), np.float32), *blocks])


def barrier(name: str) -> None:
    """Return once all processes are here. All call it, in the same order."""
    if count() > 1:
        coordinator_client().wait_at_barrier(f"jaxrlhf/barrier/{next(_numbers)}/{name}", PATIENCE_MS)
        if is_leader():  # which alone sets them: all have read what was agreed before
            coordinator_client().key_value_delete("jaxrlhf/agree")
