"""Devices, links, clusters and shares of them."""
