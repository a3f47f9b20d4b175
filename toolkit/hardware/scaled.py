"""What if the hardware were better: a cluster with more memory, faster devices or faster links."""

from __future__ import annotations

from dataclasses import replace

from toolkit.hardware.cluster import Cluster
from toolkit.hardware.device import Device
from toolkit.hardware.link import Link
from toolkit.hardware.node import Node


def scaled(
    cluster: Cluster, *, memory: float = 1.0, compute: float = 1.0, bandwidth: float = 1.0
) -> Cluster:
    """Return the cluster with these factors on its devices' memory, their arithmetic and memory
    rates, and the bandwidth of every link (to the host and measured collectives included).
    Latencies and hosts stay.

    >>> from toolkit.hardware import find_cluster
    >>> scaled(find_cluster("h100x8"), memory=2.0).device(0).memory_bytes // 2**30
    160
    """
    return replace(
        cluster,
        groups=tuple(
            replace(group, node=_node(group.node, memory, compute, bandwidth))
            for group in cluster.groups
        ),
    )


def _node(node: Node, memory: float, compute: float, bandwidth: float) -> Node:
    def faster(link: Link | None) -> Link | None:
        return replace(link, bandwidth=link.bandwidth * bandwidth) if link else None

    return replace(
        node,
        device=_device(node.device, memory, compute, bandwidth),
        link=replace(node.link, bandwidth=node.link.bandwidth * bandwidth),
        host_link=faster(node.host_link),
        nic=faster(node.nic),
        measured=tuple(replace(fit, bandwidth=fit.bandwidth * bandwidth) for fit in node.measured),
    )


def _device(device: Device, memory: float, compute: float, bandwidth: float) -> Device:
    return replace(
        device,
        memory_bytes=int(device.memory_bytes * memory),
        memory_bandwidth=device.memory_bandwidth * compute,
        host_bandwidth=device.host_bandwidth * bandwidth,
        peak_flops={dtype: rate * compute for dtype, rate in device.peak_flops.items()},
        unit_rates=tuple(
            replace(
                rates,
                memory_bandwidth=rates.memory_bandwidth * compute,
                peak_flops={dtype: rate * compute for dtype, rate in rates.peak_flops.items()},
            )
            for rates in device.unit_rates
        ),
    )
