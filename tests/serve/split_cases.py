"""What tests of the divided engine share: a decoder's work by hand, and a controller's world."""

from __future__ import annotations

from toolkit.hardware import find_device
from toolkit.serve.split.cost_model import CostModel
from toolkit.serve.split.work import Kernel, ModelWork, PerCount

L20 = find_device("l20")
_WIDTH, _LAYERS, _KV = 2048, 36, 2 * 2 * 128  # of Qwen2.5-3B; key and value heads of 128
_PARAMETERS = 77e6


def by_hand(dtype: str = "bfloat16") -> ModelWork:
    """A decoder like Qwen2.5-3B with one dense product a layer."""
    item = 2 if dtype == "bfloat16" else 4
    dense = Kernel(
        "layer",
        "matmul",
        dtype,
        PerCount(tokens=2 * _PARAMETERS),
        PerCount(constant=item * _PARAMETERS, tokens=12.0 * item * _WIDTH),
        _LAYERS,
    )
    attention = Kernel(
        "attention",
        "attention",
        dtype,
        PerCount(pairs=4.0 * _WIDTH),
        PerCount(tokens=2.0 * item * _WIDTH, context=item * _KV),
        _LAYERS,
    )
    head = Kernel(
        "head",
        "matmul",
        dtype,
        PerCount(samples=2.0 * _WIDTH * 151_936),
        PerCount(constant=item * _WIDTH * 151_936, samples=item * 151_936),
    )
    kernels = (dense, attention, head)
    weights = int(item * (_LAYERS * _PARAMETERS + _WIDTH * 151_936))
    return ModelWork("by hand", kernels, weights, item * _KV * _LAYERS, item * _WIDTH)


def cost_model(device: str = "l20", dtype: str = "bfloat16", **options: float) -> CostModel:
    return CostModel(by_hand(dtype), find_device(device), **options)  # type: ignore[arg-type]
