"""Run by test_paged.py under Triton's interpreter: the kernel against its reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from toolkit.serve.model import paged
from toolkit.serve.model.kernels import paged as kernel

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
NUM_BLOCKS = 24
# Heads, key-value heads, head size, block size, blocks of the longest table; a slow interpreter.
CASES = (
    ((2, 2, 64, 16, 6), torch.float32),
    ((6, 2, 64, 16, 2), torch.bfloat16),
    ((8, 1, 128, 16, 3), torch.float16),
    ((6, 2, 10, 5, 13), torch.bfloat16),
)


def dot_of_bfloat16() -> None:
    """The interpreter multiplies bfloat16's bits as whole numbers: widen them first."""
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            wide = [(side.data.astype(np.uint32) << 16).view(np.float32) for side in (a, b)]
            a, b = (interpreter.TensorHandle(data, tl.float32) for data in wide)
        return plain(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def check(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    heads, kv_heads, size, block, blocks = shape
    draw = torch.Generator().manual_seed(seed)
    cache = [
        torch.randn(NUM_BLOCKS, kv_heads, block, size, generator=draw).to(dtype) for _ in range(2)
    ]
    # Nothing that no sequence holds may matter: what is dead is not even a number.
    dead, context = NUM_BLOCKS - 1, blocks * block
    for each in cache:
        each[dead] = float("nan")
    lengths = torch.tensor([0, context, int(torch.randint(1, context, (), generator=draw))])
    tables = torch.randint(0, dead, (len(lengths), blocks), generator=draw)
    for row, length in enumerate(lengths.tolist()):
        tables[row, -(-length // block) :] = dead
    # As the decoder has them: queries are part of a wider row, numbers are columns of one array.
    rows = torch.randn(len(lengths), heads + 2 * kv_heads, size, generator=draw).to(dtype)
    numbers = torch.cat((lengths.unsqueeze(1), tables), dim=1).int()
    given = (rows[:, :heads], *cache, numbers[:, 1:], numbers[:, 0])
    wanted = paged.reference(*given)
    assert wanted[0].eq(0).all()
    for span in (64, 1024):
        num_spans = -(-context // span)
        got = kernel.launch(*given, scale=size**-0.5, span=span, num_spans=num_spans)
        gap = float((got.float() - wanted.float()).abs().max())
        assert gap < TOLERANCE[dtype], f"{shape} {dtype} span {span}: {gap} apart"


if __name__ == "__main__":
    assert kernel.attend_spans.__class__.__name__ == "InterpretedFunction"
    dot_of_bfloat16()
    for seed, (shape, dtype) in enumerate(CASES):
        check(shape, dtype, seed)
