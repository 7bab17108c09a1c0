"""What vendors publish of their devices, for predictions: peak, memory, bandwidths. Nothing here was measured."""

import math
from typing import NamedTuple


class Device(NamedTuple):
    """One accelerator by its published figures. Peaks are dense, without sparsity."""

    name: str
    memory: float  # GiB; a vendor's "80 GB" of HBM is read as GiB, which is within 1 % of what its driver reports
    bfloat16: float  # TFLOP/s of matrix products
    float32: float  # TFLOP/s of matrix products at jax's default precision: TF32 on GPUs, one bfloat16 pass on TPUs
    bandwidth: float  # GB/s of its memory
    link: float  # GB/s to other devices of a host or slice, one direction; 0: not known
    exact: float  # TFLOP/s of float32 products at the highest precision: FP32 without tensor cores, six bfloat16 passes on TPUs

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products in "bfloat16", "float32" (model.matmul_precision: default) or "exact float32" (highest)."""
        return 1e12 * {"bfloat16": self.bfloat16, "float32": self.float32, "exact float32": self.exact}[dtype]


# NVIDIA's data sheets (SXM boards; NVLink counted in one direction) and Google's pages on Cloud TPU system architecture.
DEVICES: dict[str, Device] = {
    "h200": Device("NVIDIA H200 SXM", 141, 989, 494, 4800, 450, 67),
    "h100": Device("NVIDIA H100 SXM", 80, 989, 494, 3350, 450, 67),
    "a100": Device("NVIDIA A100 80GB SXM", 80, 312, 156, 2039, 300, 19.5),
    "a100-40gb": Device("NVIDIA A100 40GB SXM", 40, 312, 156, 1555, 300, 19.5),
    "l4": Device("NVIDIA L4", 24, 121, 60, 300, 0, 30.3),
    "v6e": Device("Google TPU v6e", 32, 918, 918, 1640, 448, 153),
    "v5p": Device("Google TPU v5p", 95, 459, 459, 2765, 600, 76.5),
    "v5e": Device("Google TPU v5e", 16, 197, 197, 819, 200, 32.8),
    "v4": Device("Google TPU v4", 32, 275, 275, 1228, 300, 45.8),
}
# As jax names them, the whole name: an L40S is no L4, a GH200 no H200, and PCIe boards are slower than SXM ones.
_KINDS = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA A100-SXM4-40GB": "a100-40gb"}
_KINDS |= {"NVIDIA L4": "l4", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU v5 lite": "v5e", "TPU v5e": "v5e"}
_KINDS |= {"TPU v5": "v5p", "TPU v5p": "v5p", "TPU v4": "v4"}


def device_named(name: str) -> Device:
    """The entry `name`. ValueError that lists them all for another."""
    if name.lower() not in DEVICES:
        raise ValueError(f"--device {name!r} is unknown; known are {', '.join(DEVICES)}, or give --memory, --peak and --bandwidth.")
    return DEVICES[name.lower()]


def device_of_kind(kind: str) -> Device | None:
    """The entry of a device as jax names it (`jax.devices()[0].device_kind`), None for one that is not listed."""
    return DEVICES[_KINDS[kind]] if kind in _KINDS else None


def own_device(memory: float | None, peak: float | None, bandwidth: float | None, given: Device | None) -> Device:
    """`given` with what the user states instead: GiB, TFLOP/s, GB/s. ValueError unless a device of the user's own states all three."""
    stated = (memory, peak, bandwidth)
    for name, value in zip(("--memory", "--peak", "--bandwidth"), stated, strict=True):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} {value} must be a number above 0.")
    if given is None and None in stated:
        raise ValueError("a device of your own needs all of --memory GIB, --peak TFLOPS and --bandwidth GB/S; or name one with --device.")
    base = given or Device("your device", 0, 0, 0, 0, 0, 0)
    return base._replace(
        memory=base.memory if memory is None else memory,
        bfloat16=base.bfloat16 if peak is None else peak,
        float32=base.float32 if peak is None else peak,
        exact=base.exact if peak is None else peak,
        bandwidth=base.bandwidth if bandwidth is None else bandwidth,
    )
