"""Repeated blocks are traced once: the second of two equal layers is a copy of the first's trace.

Export takes milliseconds an operator, and a stack of a hundred layers has tens of thousands. While
a module is exported, every call of a numbered block (`layers.3`) that provably does what an earlier
call did is replaced by one operator, `toolkit.repeat`, which the tracer expands into copies of the
earlier call's operators. Two calls are the same when the blocks have the same classes, attributes
and parameter shapes, and the inputs the same (symbolic) shapes, strides, dtypes and aliasing, under
the same grad mode and autocast. Whatever is in doubt is traced in full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

_LIBRARY = torch.library.Library("toolkit", "FRAGMENT")
_LIBRARY.define("enter(Tensor[] inputs, int call) -> Tensor[]")
_LIBRARY.define("leave(Tensor[] outputs, int call) -> Tensor[]")
_LIBRARY.define("repeat(Tensor[] inputs, int call, int earlier) -> Tensor[]")

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass
class _Done:
    """A call that was traced: its number, and what its outputs were."""

    call: int
    leaves: list[Any]
    spec: Any


# What the outputs of a call look like, for the fake kernel of `repeat`; filled during one export.
_outputs: dict[int, list[torch.Tensor]] = {}


@torch.library.register_fake("toolkit::enter", lib=_LIBRARY)
@torch.library.register_fake("toolkit::leave", lib=_LIBRARY)
def _pass_on(tensors: list[torch.Tensor], call: int) -> list[torch.Tensor]:
    return [_like(tensor) for tensor in tensors]


@torch.library.register_fake("toolkit::repeat", lib=_LIBRARY)
def _repeat(inputs: list[torch.Tensor], call: int, earlier: int) -> list[torch.Tensor]:
    return [_like(tensor) for tensor in _outputs[earlier]]


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


@contextlib.contextmanager
def tracing_once(module: torch.nn.Module, own: Mapping[str, str]) -> Iterator[Mapping[int, str]]:
    """Let equal calls of the numbered blocks of `module` be traced once, meanwhile.

    `own` gives every parameter's first name (tied ones share it). Yields the path of the block
    behind each call's number, which fills as the module is exported.
    """
    watcher = _Watcher(own)
    for path, block, signature in _blocks(module, "", own):
        watcher.blocks[id(vars(block))] = (path, signature)
    # Export calls a block through a stand-in of its own that shares only the block's __dict__ and
    # class (and reads the module path off the stand-in), so the class is what is watched.
    kinds = {type(block) for _, block, _ in _blocks(module, "", own)}
    with contextlib.ExitStack() as undo:
        for kind in kinds:
            undo.enter_context(_replaced_forward(kind, watcher.watched(kind.forward)))
        undo.callback(_outputs.clear)
        yield watcher.calls


@contextlib.contextmanager
def _replaced_forward(kind: type[torch.nn.Module], forward: Any) -> Iterator[None]:
    inherited = "forward" not in vars(kind)
    original = kind.forward
    kind.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if inherited:
            del kind.forward
        else:
            kind.forward = original  # type: ignore[method-assign]


def _blocks(
    module: torch.nn.Module, path: str, own: Mapping[str, str]
) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """The outermost numbered modules that have an equal among their siblings."""
    signatures: dict[str, str] = {}
    for name, child in module.named_children():
        if name.isdigit():
            signatures[name] = _signature(child, f"{path}{name}", own)
    for name, child in module.named_children():
        found = signatures.get(name, "")
        alike = sum(found == other for other in signatures.values()) if found else 0
        if alike > 1:
            yield f"{path}{name}", child, found
        else:
            yield from _blocks(child, f"{path}{name}.", own)


def _signature(module: torch.nn.Module, path: str, own: Mapping[str, str]) -> str:
    """All that decides what a block does, but for its inputs; "" when that cannot be told."""
    described = []
    for name, part in module.named_modules(remove_duplicate=False):
        attributes = {}
        for key, value in vars(part).items():
            if key in ("_modules", "_parameters", "_buffers", "training"):
                continue
            if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                if value:
                    return ""
                continue
            attributes[key] = _fingerprint(value)
        tensors: list[tuple[Any, ...]] = []
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is None:
                tensors.append((key, None))
                continue
            full = ".".join(filter(None, (path, name, key)))
            first = own.get(full, full)
            inside = first.startswith(f"{path}.")
            tensors.append((
                key, first.removeprefix(path) if inside else first, tuple(tensor.shape),
                tensor.dtype, tensor.requires_grad, type(tensor),
            ))  # fmt: skip
        described.append((name, type(part), part.training, attributes, tensors))
    return repr(described)


def _state(block: torch.nn.Module, path: str, own: Mapping[str, str]) -> Any:
    """What a call could have changed in a block."""
    tensors = [id(tensor) for tensor in (*block.parameters(), *block.buffers())]
    return tensors, _signature(block, path, own)


def _fingerprint(value: Any) -> Any:
    """Equal for values that cannot make a difference; for any other object, the object itself."""
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(_fingerprint(part) for part in value))
    if isinstance(value, dict):
        return (dict, tuple((key, _fingerprint(part)) for key, part in value.items()))
    if isinstance(value, (set, frozenset)) and all(isinstance(part, _PLAIN) for part in value):
        return (type(value), frozenset(value))
    return (type(value), id(value))


class _Watcher:
    """What one export has called so far."""

    def __init__(self, own: Mapping[str, str]) -> None:
        self.own = own
        self.blocks: dict[int, tuple[str, str]] = {}  # id of __dict__ -> path, signature
        self.calls: dict[int, str] = {}
        self.done: dict[str, _Done] = {}
        self.running: set[int] = set()  # a block's own super().forward is no call of its own

    def watched(self, original: Any) -> Any:
        """Return a `forward` that traces, or repeats, a call of a known block."""

        def forward(block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            block_id = id(vars(block))
            known = None if block_id in self.running else self.blocks.get(block_id)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            key = _call_key(leaves, spec, known[1]) if known else ""
            if not known or not key:
                return original(block, *args, **kwargs)
            call = len(self.calls)
            self.calls[call] = known[0]
            if key in self.done:
                tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
                earlier = self.done[key]
                return _filled(earlier, torch.ops.toolkit.repeat(tensors, call, earlier.call))
            self.running.add(block_id)
            try:
                return self._traced(original, block, call, key, leaves, spec)
            finally:
                self.running.remove(block_id)

        return forward

    def _traced(
        self, original: Any, block: torch.nn.Module, call: int, key: str, leaves: list[Any],
        spec: Any,
    ) -> Any:  # fmt: skip
        """Trace a call between an `enter` and a `leave`, and remember it if it can be repeated."""
        path = self.calls[call]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        entered = _filled(_Done(call, leaves, spec), torch.ops.toolkit.enter(tensors, call))
        before = _state(block, path, self.own)
        results, result_spec = pytree.tree_flatten(original(block, *entered[0], **entered[1]))
        found = [leaf for leaf in results if isinstance(leaf, torch.Tensor)]
        made = torch.ops.toolkit.leave(found, call)
        traced = _Done(call, results, result_spec)
        rest = [leaf for leaf in results if not isinstance(leaf, torch.Tensor)]
        # A block that changed itself, or returned more than tensors, is traced every time.
        unchanged = before == _state(block, path, self.own)
        if unchanged and all(isinstance(leaf, _PLAIN) for leaf in rest):
            _outputs[call] = found
            self.done[key] = traced
        return _filled(traced, made)


def _filled(done: _Done, tensors: Sequence[torch.Tensor]) -> Any:
    made = iter(tensors)
    leaves = [next(made) if isinstance(leaf, torch.Tensor) else leaf for leaf in done.leaves]
    return pytree.tree_unflatten(leaves, done.spec)


def _call_key(leaves: list[Any], spec: Any, signature: str) -> str:
    """All that decides what a call traces to; "" when that cannot be told."""
    described: list[Any] = []
    first: dict[int, int] = {}
    storages: dict[int, int] = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()._cdata
            described.append((
                _text(leaf.shape), _text(leaf.stride()), _text([leaf.storage_offset()]),
                leaf.dtype, leaf.device, first.setdefault(id(leaf), place),
                storages.setdefault(storage, place), type(leaf),
            ))  # fmt: skip
        elif isinstance(leaf, (torch.SymInt, torch.SymFloat)):
            described.append(_text([leaf]))
        elif isinstance(leaf, _PLAIN):
            described.append((type(leaf), leaf))
        else:
            return ""
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return ""
    modes = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
             for kind in ("cpu", "cuda")]  # fmt: skip
    return repr((described, str(spec), torch.is_grad_enabled(), modes, signature))


def _text(sizes: Any) -> tuple[str, ...]:
    return tuple(
        str(size.node.expr) if isinstance(size, (torch.SymInt, torch.SymFloat)) else str(size)
        for size in sizes
    )
