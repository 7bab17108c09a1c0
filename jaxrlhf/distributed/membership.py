"""The number of processes, the index of this one, and whether it leads. In a single process JAX is not used."""

import sys
from typing import Any


def count() -> int:
    """How many processes there are."""
    jax = _joined()
    return 1 if jax is None else jax.process_count()


def index() -> int:
    """The number of this process; 0 is the leader."""
    jax = _joined()
    return 0 if jax is None else jax.process_index()


def _joined() -> Any:
    """The module jax where it has joined this process with others, else None; a process that has not imported it is a single one."""
    jax = sys.modules.get("jax")
    return jax if jax is not None and jax.distributed.is_initialized() else None


def is_leader() -> bool:
    """Whether this process decides, writes and logs; a single process does."""
    return index() == 0


def coordinator_client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client
