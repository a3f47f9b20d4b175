"""Counting what a step communicates, under the names and sizes that predictions use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.plan.lower.compat import TorchDispatchMode

_Arguments = tuple[Any, ...]


def _numel_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_numel_bytes(item) for item in value)


def _first(args: _Arguments) -> int:
    return _numel_bytes(args[0])


def _second(args: _Arguments) -> int:
    return _numel_bytes(args[1])


def _times_group(args: _Arguments) -> int:
    return _numel_bytes(args[0]) * int(args[1])


# op -> (kind, bytes of the full tensor). c10d's own ops are what FSDP2, pipelining and
# torch.distributed call; the functional ones are DTensor's.
_KINDS: Mapping[str, tuple[str, Callable[[_Arguments], int]]] = {
    "c10d.allreduce_": ("all_reduce", _first),
    "c10d.allgather_": ("all_gather", _first),
    "c10d._allgather_base_": ("all_gather", _first),
    "c10d._reduce_scatter_base_": ("reduce_scatter", _second),
    "c10d.broadcast_": ("broadcast", _first),
    "c10d.alltoall_base_": ("all_to_all", _second),
    "c10d.send": ("send", _first),
    "c10d.recv_": ("recv", _first),
    "_c10d_functional.all_reduce": ("all_reduce", _first),
    "_c10d_functional.all_reduce_": ("all_reduce", _first),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", _times_group),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", _first),
    "_c10d_functional.all_to_all_single": ("all_to_all", _first),
    "_c10d_functional.broadcast": ("broadcast", _first),
}
_NO_TRAFFIC = {
    "_c10d_functional.wait_tensor",
    "_c10d_functional._wrap_tensor_autograd",
    "c10d.barrier",
}


class Counter(TorchDispatchMode):
    """Counts the communication issued inside its block, on the calling rank.

    `calls` maps each kind to (count, bytes of the full tensors). A communication op that is not
    known is an error: it must not go uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[int, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: _Arguments = (), kwargs: Any = None
    ) -> Any:
        if "c10d" in func.namespace:
            self._count(str(func).rpartition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: _Arguments) -> None:
        if name in _NO_TRAFFIC:
            return
        if name not in _KINDS:
            raise ToolkitError(
                f"communication op {name} is not known to the counter",
                remedy="add its kind and size to toolkit/plan/counting.py",
            )
        kind, size = _KINDS[name]
        count, num_bytes = self.calls.get(kind, (0, 0))
        self.calls[kind] = (count + 1, num_bytes + size(args))
