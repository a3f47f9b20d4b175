"""Measure this machine: GEMM and memory per thread count, disk, gloo collectives, CUDA devices."""

from toolkit.hardware.probe.run import Options, Result, parts, run

__all__ = ["Options", "Result", "parts", "run"]
