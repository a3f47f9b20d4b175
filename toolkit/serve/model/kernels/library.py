"""The kernels' functions and structures, as ctypes sees them.

The other half is in model.h, attention.h and decoder.cpp.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.serve.model.kernels.build import library_path

_INSTRUCTION_SETS = ("portable C++", "AVX2", "AVX-512 VNNI")


class CMatrix(Structure):
    _fields_ = (
        ("format", c_int32), ("n", c_int32), ("k", c_int32), ("reserved", c_int32),
        ("panels", c_void_p), ("bias", c_void_p),
    )  # fmt: skip


class CNorm(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class CLayer(Structure):
    _fields_ = (
        ("attention_norm", CNorm), ("ffn_norm", CNorm), ("q_norm", c_void_p), ("k_norm", c_void_p),
        ("qkv", CMatrix), ("output", CMatrix), ("gate_up", CMatrix), ("down", CMatrix),
    )  # fmt: skip


class CModel(Structure):
    _fields_ = (
        ("layers", c_int32), ("hidden", c_int32), ("heads", c_int32), ("kv_heads", c_int32),
        ("head_size", c_int32), ("ffn", c_int32), ("vocab", c_int32), ("gelu", c_int32),
        ("eps", c_float), ("reserved_float", c_float),
        ("layer", POINTER(CLayer)), ("norm", CNorm), ("head", CMatrix),
        ("embedding", c_void_p), ("positions", c_void_p), ("cos", c_void_p), ("sin", c_void_p),
    )  # fmt: skip


class CCache(Structure):
    _fields_ = (
        ("keys", POINTER(c_void_p)), ("values", POINTER(c_void_p)),
        ("block_size", c_int32), ("padded_block", c_int32), ("padded_head", c_int32),
        ("half", c_int32),
    )  # fmt: skip


class CStep(Structure):
    _fields_ = (
        ("num_tokens", c_int32), ("num_sequences", c_int32), ("num_samples", c_int32),
        ("logits_stride", c_int32),
        ("tokens", c_void_p), ("positions", c_void_p), ("slots", c_void_p), ("tables", c_void_p),
        ("sample_rows", c_void_p), ("sequences", c_void_p), ("logits", c_void_p),
        ("pooled_rows", c_void_p), ("hidden", c_void_p), ("num_pooled", c_int32),
        ("hidden_stride", c_int32),
    )  # fmt: skip


@dataclass(frozen=True)
class Library:
    """The loaded kernels and the layout they were compiled for.

    `lanes` numbers are in a vector, `joined_k` neighbouring inputs in one 8-bit product, whose
    weights are kept `int8_zero` too large.
    """

    calls: Any
    instruction_set: str
    lanes: int
    joined_k: int
    int8_zero: int

    @property
    def panel(self) -> int:
        """Outputs of a packed matrix that lie together."""
        return 2 * self.lanes


@functools.cache
def library() -> Library:
    """Return the kernels, built if need be. Raises ToolkitError where they cannot be."""
    return load(library_path())


def load(path: Path) -> Library:
    """Return the kernels built at `path`."""
    calls = ctypes.CDLL(str(path))
    calls.kernels_open.restype = c_void_p
    calls.kernels_open.argtypes = (c_int32, c_void_p, c_int32)
    calls.kernels_close.argtypes = (c_void_p,)
    calls.kernels_step.argtypes = (c_void_p, POINTER(CModel), POINTER(CCache), POINTER(CStep))
    calls.kernels_multiply.argtypes = (c_void_p, POINTER(CMatrix), c_void_p, c_int32, c_void_p)
    calls.kernels_argmax.argtypes = (c_void_p, c_void_p, c_int32, c_int32, c_int32, c_void_p)
    calls.kernels_exp.argtypes = (c_void_p, c_void_p, c_int32)
    for name in ("close", "layout", "step", "multiply", "argmax", "exp"):
        getattr(calls, f"kernels_{name}").restype = None
    layout = (c_int32 * 4)()
    calls.kernels_layout(layout)
    return Library(calls, _INSTRUCTION_SETS[layout[0]], layout[1], layout[2], layout[3])


class Team:
    """Threads that compute together, with the memory they need: the caller and `threads - 1` more.

    Used from one thread at a time.
    """

    def __init__(self, library: Library, threads: int, cpus: Sequence[int] = ()) -> None:
        """`cpus`: where the threads run, the caller's first; empty leaves it to the system."""
        self._library, self._handle = library, None
        numbers = (c_int32 * max(1, len(cpus)))(*cpus)
        self._handle = self._library.calls.kernels_open(threads, numbers, len(cpus))

    def step(self, model: CModel, cache: CCache, step: CStep) -> None:
        """Compute one step of a decoder."""
        self._library.calls.kernels_step(self._handle, model, cache, step)

    def multiply(self, matrix: CMatrix, x: int, rows: int, y: int) -> None:
        """Multiply `rows` rows at address `x` by a matrix, into `y` (rows of whole panels)."""
        self._library.calls.kernels_multiply(self._handle, matrix, x, rows, y)

    def argmax(self, x: int, shape: tuple[int, int], stride: int) -> list[int]:
        """Return where the largest number of each row stands, of float32 `shape` at address `x`."""
        rows, columns = shape
        found = (c_int32 * rows)()
        self._library.calls.kernels_argmax(self._handle, x, rows, stride, columns, found)
        return list(found)

    def close(self) -> None:
        """End the threads. Safe more than once."""
        if self._handle is not None:
            self._library.calls.kernels_close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()
