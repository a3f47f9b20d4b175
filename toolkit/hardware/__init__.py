"""Devices, links, clusters and shares of them."""

from toolkit.hardware.cluster import Cluster
from toolkit.hardware.compose import find_cluster, find_device
from toolkit.hardware.device import Device
from toolkit.hardware.link import Link
from toolkit.hardware.node import Node
from toolkit.hardware.share import Share

__all__ = ["Cluster", "Device", "Link", "Node", "Share", "find_cluster", "find_device"]
