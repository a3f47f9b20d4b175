"""Tracking what a rank really holds: the bytes of every tensor's memory, as they come and go.

Works on any device and on gloo ranks: memory is followed storage by storage as operators return
it, so what an allocator rounds up or keeps back plays no part. What a kernel needs inside itself
is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from toolkit.plan.lower.compat import TorchDispatchMode


class Tracker(TorchDispatchMode):
    """Follows the memory of tensors made inside its block, and of those given to `watch`.

    `held_bytes` is what is alive now, `peak_bytes` the most there was since `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held_bytes = 0
        self.peak_bytes = 0
        self._sizes: Any = WeakIdKeyDictionary()  # storage -> its size, a list of one
        self._resize = torch.UntypedStorage.resize_

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors made before: parameters, gradients, an optimizer's moments."""
        for tensor in tensors:
            for part in _parts(tensor):
                self._see(part.untyped_storage())

    def reset(self) -> None:
        """Forget the peak: what is held now is the most so far."""
        self.peak_bytes = self.held_bytes

    def __enter__(self) -> Tracker:
        resize = self._resize

        def followed(storage: torch.UntypedStorage, size: int) -> Any:
            found = resize(storage, size)
            self._see(storage)
            return found

        # FSDP2 frees what it gathered by resizing to nothing, which no operator shows.
        torch.UntypedStorage.resize_ = followed  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls its local tensors' operators, which come back here
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            self._see(tensor.untyped_storage())
        return found

    def _see(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        known = self._sizes.get(storage)
        if known is None:
            if storage.device.type == "meta":
                return
            known = [0]
            self._sizes[storage] = known
            weakref.finalize(storage, self._gone, known)
        self.held_bytes += size - known[0]
        known[0] = size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def _gone(self, size: list[int]) -> None:
        self.held_bytes -= size[0]


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if tensor.grad is not None:
        yield from _parts(tensor.grad)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
