"""Matrix products in torch: for machines without a C++ compiler, and what the kernels are held to.

A float32 weight is laid out once for oneDNN where torch lets us; a grouped one is multiplied as
the integer kernels would, activations rounded alike, in floating point.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from toolkit.serve.model.grouped import Grouped, Weight, round_activations

# The batch the layout is made for; it serves other batches nearly as well (a layout made for 1
# loses the gain at 8 and above).
_ROWS = 32


class Product(Protocol):
    """`x @ weight.T + bias`."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight as held."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[rows, out]` for `x` `[rows, in]`."""
        ...


def product(weight: Weight, bias: torch.Tensor | None = None) -> Product:
    """Return the product with a weight `[out, in]`, which is given away."""
    return (GroupedLinear if isinstance(weight, Grouped) else Linear)(weight, bias)  # type: ignore[arg-type]


class Linear:
    """The product with a dense weight, where it lies.

    On a CPU oneDNN's own layout saves float32 the transposition that a plain product repeats at
    every call. torch offers it to its compiler only, under names without a promise, so they are
    looked for, and without them this is `F.linear`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        held = weight.device.type == "cpu" and weight.dtype is torch.float32
        self._packed = held and torch.backends.mkldnn.is_available() and _has_packed_products()
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self._weight = weight

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, "none", [], ""
            )
            return product
        return F.linear(x, self._weight, self._bias)


class GroupedLinear:
    """The product with a grouped weight: held dequantised, because torch has no such product."""

    def __init__(self, weight: Grouped, bias: torch.Tensor | None = None) -> None:
        self._weight, self._bias = weight.dequantised(), bias

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        short = self._weight.shape[1] - x.shape[1]
        return F.linear(round_activations(F.pad(x, (0, short))), self._weight, self._bias)


def _has_packed_products() -> bool:
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in names)
