"""Which outputs are views: whether an operator moves data or only looks at it differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# These never move data.
VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "alias", "as_strided", "chunk", "detach", "diagonal", "expand", "expand_as", "movedim",
        "narrow", "permute", "real", "select", "slice", "split", "split_with_sizes", "squeeze",
        "swapaxes", "t", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view",
        "view_as", "lift_fresh", "numpy_T", "mT", "tensor_split",
    )
)  # fmt: skip

# These return their input itself when there is nothing to do, and a new tensor otherwise.
_MAYBE = frozenset(
    f"aten.{name}"
    for name in (
        "reshape", "reshape_as", "flatten", "contiguous", "to", "type_as", "dropout", "float",
        "feature_dropout",
    )
)  # fmt: skip


def is_view(kind: str, arguments: dict[str, Any], base: Any, out: Any) -> bool:
    """Return whether operator `kind` gave `out` as a view of `base` (tensors of known strides)."""
    if kind in VIEWS:
        return True
    if kind not in _MAYBE or out.dtype != base.dtype:
        return False
    if kind in ("aten.dropout", "aten.feature_dropout"):
        return not arguments["train"] or arguments["p"] == 0
    if kind in ("aten.to", "aten.type_as"):
        return not arguments.get("copy", False)
    if kind == "aten.contiguous":
        return _strides(base) == _strides(out)
    if kind in ("aten.reshape", "aten.reshape_as", "aten.flatten"):
        return _can_view(base, [_hint(size) for size in out.shape])
    return False


def _hint(value: Any) -> int:
    return value if isinstance(value, int) else int(value.node.hint)


def _strides(tensor: Any) -> list[int]:
    sizes = [_hint(size) for size in tensor.shape]
    # The stride of a dim of size 1 says nothing.
    return [0 if n == 1 else _hint(s) for n, s in zip(sizes, tensor.stride(), strict=True)]


def _can_view(tensor: Any, shape: Sequence[int]) -> bool:
    sizes = [_hint(size) for size in tensor.shape]
    strides = [_hint(stride) for stride in tensor.stride()]
    try:
        torch.empty_strided(sizes, strides, device="meta").view(shape)
    except RuntimeError:
        return False
    return True
