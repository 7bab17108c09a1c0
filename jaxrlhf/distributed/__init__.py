"""Run several processes as one: they find each other, agree on values, and end together.

Process 0 is the leader: it decides, locks, writes and logs. In a single process `agree` and `barrier` do nothing. Importing this does not
import JAX.
"""

from jaxrlhf.distributed.cluster import ProcessError
from jaxrlhf.distributed.exchange import agree, agree_on_columns, agree_on_rows, barrier
from jaxrlhf.distributed.group import abort, failure_elsewhere, finish, is_grouped, start
from jaxrlhf.distributed.membership import count, index, is_leader

__all__ = [
    "ProcessError", "abort", "agree", "agree_on_columns", "agree_on_rows", "barrier", "count", "failure_elsewhere", "finish", "index",
    "is_grouped", "is_leader", "start",
]  # fmt: skip
