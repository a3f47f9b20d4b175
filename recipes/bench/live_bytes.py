"""The bytes of tensors that are alive while a block runs, at their peak, gradients left out."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows every storage made inside the block until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # (storage, bytes: negative when freed)
        self._known: dict[int, int] = {}
        self._numbers: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._see(leaf, counts=False)  # it was there before: a parameter, an input
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return made

    def _see(self, tensor: Tensor, *, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        number = self._known[id(storage)] = len(self.events)
        self._numbers[storage.data_ptr()] = number
        size = storage.nbytes() if counts else 0
        self.events.append((number, size))
        weakref.finalize(storage, self._freed, id(storage), number, size)

    def _freed(self, key: int, number: int, size: int) -> None:
        self._known.pop(key, None)
        self.events.append((number, -size))

    def peak(self, but: Iterable[Tensor | None]) -> int:
        """Return the most bytes alive at once, without the storages of the tensors `but`."""
        left_out = {
            self._numbers.get(tensor.untyped_storage().data_ptr())
            for tensor in but
            if tensor is not None
        }
        most = now = 0
        for number, size in self.events:
            if number not in left_out:
                now += size
                most = max(most, now)
        return most
