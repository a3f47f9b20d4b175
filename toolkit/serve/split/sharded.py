"""A decoder on several equal devices that share every layer: one device's kernels, and the sums.

Tensor parallel as in Megatron-LM (arXiv 1909.08053, section 3): heads and hidden widths are
divided, norms are not, and each layer ends two sums of a step's hidden states over all devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from toolkit.cost.span import span
from toolkit.errors import InfeasibleError
from toolkit.hardware.cluster import Cluster
from toolkit.serve.split.work import Kernel, Load, ModelWork

_SUMS_PER_LAYER = 2


@dataclass(frozen=True)
class Exchange:
    """The sums of a step: `count` of them, each `latency_s` and what its tokens take."""

    count: int
    latency_s: float
    seconds_per_token: float

    def seconds(self, load: Load) -> float:
        """Return what a step's sums take.

        >>> Exchange(count=4, latency_s=1.0, seconds_per_token=0.5).seconds(Load.chunk(0, 2))
        8.0
        """
        return self.seconds_of(load.tokens)

    def seconds_of(self, tokens: int) -> float:
        """Return what the sums of a step of so many tokens take."""
        return self.count * (self.latency_s + tokens * self.seconds_per_token)


def sharded(model: ModelWork, cluster: Cluster) -> tuple[ModelWork, Exchange]:
    """Return one device's part of `model` over all of `cluster`, and the step's sums.

    Products and attention are divided with all their bytes; activations that every device reads
    whole are so counted too low, by little beside the weights. Sums go round a ring, which takes
    2 (n - 1) latencies and 2 (n - 1) / n of the data over a device's link. Raises InfeasibleError
    for devices that differ.
    """
    degree = cluster.num_devices
    if not cluster.is_homogeneous:
        raise InfeasibleError(
            f"{cluster.name} has devices that differ", remedy="share a model over equal ones"
        )
    kernels = tuple(
        _divided(kernel, degree) if kernel.op_class in ("matmul", "attention") else kernel
        for kernel in model.kernels
    )
    layers = sum(kernel.count for kernel in model.kernels if kernel.op_class == "attention")
    wires = span(tuple(cluster.ranks), cluster)
    steps = 2 * (degree - 1)
    exchange = Exchange(
        count=_SUMS_PER_LAYER * layers if degree > 1 else 0,
        latency_s=steps * wires.latency,
        seconds_per_token=steps / degree * model.hidden_bytes / wires.ring_bandwidth,
    )
    part = replace(
        model,
        kernels=kernels,
        weight_bytes=-(-model.weight_bytes // degree),
        kv_bytes_per_token=-(-model.kv_bytes_per_token // degree),
    )
    return part, exchange


def _divided(kernel: Kernel, degree: int) -> Kernel:
    return replace(
        kernel,
        flops=kernel.flops.scaled(1 / degree),
        moved_bytes=kernel.moved_bytes.scaled(1 / degree),
    )
