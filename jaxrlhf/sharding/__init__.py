"""Place arrays on devices and compile what runs on them. Only this folder imports `jax.sharding`.

`mesh_of` makes the value that all others pass around as `mesh`, without looking inside: a mesh, or `Replicas` for `jax.pmap`.
"""

from jaxrlhf.sharding.compile import Compiled, constrain_rows, row_constraints, rows, rows_and_metrics, step
from jaxrlhf.sharding.host_memory import check_offload, offload, to_device
from jaxrlhf.sharding.mesh import (
    AXES,
    BATCH_AXES,
    Devices,
    Replicas,
    axis_sizes,
    check_batch_size,
    data_shards,
    make_mesh,
    mesh_of,
    rows_at_once,
)
from jaxrlhf.sharding.placement import build, gather, init_on_mesh, place, place_batch, replicate, uncommitted
from jaxrlhf.sharding.rules import RULES, path_of, shardings, template

__all__ = [
    "AXES", "BATCH_AXES", "RULES", "Compiled", "Devices", "Replicas", "axis_sizes", "build", "check_batch_size", "check_offload",
    "constrain_rows", "data_shards", "gather", "init_on_mesh", "make_mesh", "mesh_of", "offload", "path_of", "place", "place_batch",
    "replicate", "row_constraints", "rows", "rows_and_metrics", "rows_at_once", "shardings", "step", "template", "to_device",
    "uncommitted",
]  # fmt: skip
