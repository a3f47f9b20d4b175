"""Matrix-multiply rates on the CPU, per data type; and what one small operator costs."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from toolkit.hardware.probe.timing import best_rate, durations

if TYPE_CHECKING:
    import torch

DTYPES = ("float64", "float32", "float16", "bfloat16", "int8")
QUICK_DTYPES = ("float32", "bfloat16", "int8")


def flops(dtype: str, sizes: tuple[int, ...], *, budget_s: float) -> float:
    """Return the best FLOP/s over square multiplies X @ W.T of these sizes.

    The number of threads is the caller's: set torch.set_num_threads before. W is stored as
    nn.Linear stores it, because 16-bit rates depend on the layout. Raises RuntimeError where
    torch has no kernel for the type.
    """
    per_size_s = budget_s / len(sizes)
    return max(
        best_rate(2.0 * size**3, _multiply(dtype, size), budget_s=per_size_s) for size in sizes
    )


def _multiply(dtype: str, size: int) -> Callable[[], object]:
    import torch

    generator = torch.Generator().manual_seed(0)
    if dtype == "int8":
        return _multiply_int8(size, generator)
    kind = getattr(torch, dtype)
    x = torch.randn(size, size, generator=generator).to(kind)
    weight = torch.randn(size, size, generator=generator).to(kind)
    return lambda: torch.nn.functional.linear(x, weight)


def _multiply_int8(size: int, generator: torch.Generator) -> Callable[[], object]:
    """8-bit multiply with 32-bit sums: fbgemm's packed linear, the fastest torch ships on CPUs."""
    import torch

    torch.backends.quantized.engine = "fbgemm" if "fbgemm" in _engines() else _engines()[-1]
    values = torch.randn(size, size, generator=generator)
    with warnings.catch_warnings():
        # Deprecated, and still the only way to torch's packed 8-bit kernels.
        warnings.simplefilter("ignore", UserWarning)
        x = torch.quantize_per_tensor(values, 0.05, 64, torch.quint8)
        weight = torch.quantize_per_tensor(values, 0.05, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return lambda: torch.ops.quantized.linear(x, packed, 0.1, 64)


def _engines() -> list[str]:
    import torch

    engines = [str(name) for name in torch.backends.quantized.supported_engines if name != "none"]
    if not engines:
        raise RuntimeError("this torch has no quantized engine")
    return engines


def op_overhead_s(*, budget_s: float) -> float:
    """Return the median seconds of an addition of 16 numbers: dispatch, and no work to speak of."""
    import torch

    x, y = torch.ones(16), torch.ones(16)
    out = torch.empty(16)
    num_calls = 200

    def many() -> None:
        for _ in range(num_calls):
            torch.add(x, y, out=out)

    return statistics.median(durations(many, budget_s=budget_s)) / num_calls
