"""Work: what an operator asks of a device, independent of which device that is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

OpClass = Literal[
    "matmul",  # GEMM, batched GEMM, linear
    "attention",  # fused scaled-dot-product attention
    "conv",
    "norm",  # layer norm, RMS norm, softmax: a reduction and a map over the same data
    "elementwise",
    "reduction",
    "gather",  # embedding, indexing
    "scatter",
    "copy",  # materialising a layout: contiguous, cat, clone
    "view",  # no data moves
]
OP_CLASSES: tuple[OpClass, ...] = get_args(OpClass)


@dataclass(frozen=True)
class Work:
    """Floating-point operations (a multiply-add counts as 2) and the bytes that must move.

    Bytes are the compulsory traffic: every distinct input read once, every output written once.
    `dtype` is the type the arithmetic runs in ("float32", "bfloat16", "int8", ...).
    """

    op_class: OpClass
    flops: float = 0.0
    read_bytes: float = 0.0
    write_bytes: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.op_class not in OP_CLASSES:
            raise ValueError(f"op class {self.op_class!r} is none of {OP_CLASSES}")
        if min(self.flops, self.read_bytes, self.write_bytes) < 0:
            raise ValueError(f"negative work: {self}")

    @property
    def moved_bytes(self) -> float:
        return self.read_bytes + self.write_bytes

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved; infinite when nothing moves."""
        return self.flops / self.moved_bytes if self.moved_bytes else float("inf")

    def scaled(self, factor: float) -> Work:
        """Return `factor` times this work (a shard: 1/n; n repeats: n).

        >>> Work("matmul", flops=8.0, read_bytes=2.0).scaled(0.5).flops
        4.0
        """
        return Work(
            self.op_class,
            self.flops * factor,
            self.read_bytes * factor,
            self.write_bytes * factor,
            self.dtype,
        )


@dataclass(frozen=True)
class Total:
    """The sum over many pieces of work, kept for reporting; time is not computed from a sum."""

    flops: float = 0.0
    read_bytes: float = 0.0
    write_bytes: float = 0.0

    @property
    def moved_bytes(self) -> float:
        return self.read_bytes + self.write_bytes


def total(works: Iterable[Work]) -> Total:
    """Return the summed FLOPs and bytes of `works`.

    >>> total([Work("matmul", flops=2.0), Work("norm", flops=1.0, read_bytes=4.0)]).flops
    3.0
    """
    flops = read_bytes = write_bytes = 0.0
    for work in works:
        flops += work.flops
        read_bytes += work.read_bytes
        write_bytes += work.write_bytes
    return Total(flops, read_bytes, write_bytes)
