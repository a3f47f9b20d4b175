"""A matrix product whose weight is laid out once for the CPU's kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# The batch the layout is made for; it serves other batches nearly as well (a layout made for 1
# loses the gain at 8 and above).
_ROWS = 32


class Linear:
    """`x @ weight.T + bias` for float32 `weight` `[out, in]`, given away on construction.

    oneDNN's own layout saves the transposition that a plain product repeats at every call. torch
    offers it to its compiler only, under names without a promise, so they are looked for, and
    without them this is `F.linear`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        self._packed = torch.backends.mkldnn.is_available() and _has_packed_products()
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self._weight = weight

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[rows, out]` for `x` `[rows, in]`."""
        if self._packed:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, "none", [], ""
            )
            return product
        return F.linear(x, self._weight, self._bias)


def _has_packed_products() -> bool:
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in names)
