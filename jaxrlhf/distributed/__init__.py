"""Several processes that work as one: how they find each other, agree on what to do, and end together.

Process 0 is the leader: it decides, locks, writes and logs. In a process that stands alone `agree` and `barrier` do nothing, and importing
this imports no JAX.
"""

from jaxrlhf.distributed.cluster import ProcessError
from jaxrlhf.distributed.exchange import agree, agree_on_columns, agree_on_rows, barrier
from jaxrlhf.distributed.group import abort, failure_elsewhere, finish, is_grouped, start
from jaxrlhf.distributed.membership import count, index, is_leader

__all__ = [
    "ProcessError",
    "abort",
    "agree",
    "agree_on_columns",
    "agree_on_rows",
    "barrier",
    "count",
    "failure_elsewhere",
    "finish",
    "index",
    "is_grouped",
    "is_leader",
    "start",
]
