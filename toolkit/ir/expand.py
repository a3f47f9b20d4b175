"""Copies of a traced block: what `toolkit.repeat` stands for, written out (see repeat.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from toolkit.ir import formulas
from toolkit.ir.graph import Argument, Op, Ref, Tensor
from toolkit.ir.scale import Size


class CannotRepeatError(Exception):
    """A block's trace cannot be copied; the model is then traced in full."""


@dataclass
class Parts:
    """What a tracer has collected so far, and how it names the next operator."""

    ops: list[Op]
    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int | Size, ...]]
    arguments: dict[str, dict[str, Argument]]
    modules: dict[str, str]
    own: Mapping[str, str]  # FQN -> the parameter's first FQN
    new_name: Callable[[str, str], str]  # (module path, operator) -> name


@dataclass
class _Traced:
    path: str
    inputs: tuple[str, ...]
    start: int
    outputs: tuple[str, ...] = ()
    ops: list[Op] = field(default_factory=list)


class Repeats:
    """The calls that were traced, each with the operators between its entry and its exit."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._traced: dict[int, _Traced] = {}

    def enter(self, call: int, path: str, inputs: tuple[str, ...]) -> None:
        self._traced[call] = _Traced(path, inputs, len(self._parts.ops))

    def leave(self, call: int, outputs: tuple[str, ...]) -> None:
        traced = self._traced[call]
        traced.outputs = outputs
        traced.ops = self._parts.ops[traced.start :]

    def repeat(self, earlier: int, path: str, inputs: tuple[str, ...]) -> tuple[str, ...]:
        """Append copies of the earlier call's operators, reading `inputs`; return its outputs."""
        traced = self._traced[earlier]
        copy = _Copy(self._parts, traced, path, inputs)
        for op in traced.ops:
            copy.append(op)
        for module, kind in list(self._parts.modules.items()):
            self._parts.modules.setdefault(copy.moved(module), kind)
        return tuple(copy.renamed(name) for name in traced.outputs)


class _Copy:
    def __init__(self, parts: Parts, traced: _Traced, path: str, inputs: tuple[str, ...]) -> None:
        self._parts, self._from, self._to = parts, traced.path, path
        self._names = dict(zip(traced.inputs, inputs, strict=True))
        # A view made inside of what came from outside lies in the outside tensor's memory.
        self._storages = {
            parts.tensors[theirs].storage: parts.tensors[ours].storage
            for theirs, ours in self._names.items()
        }

    def moved(self, path: str) -> str:
        """A module path or FQN inside the traced block, as it is inside this one."""
        if path == self._from or path.startswith(f"{self._from}."):
            return self._to + path.removeprefix(self._from)
        return path  # a module that blocks share keeps its first name

    def renamed(self, name: str) -> str:
        if name in self._names:
            return self._names[name]
        tensor = self._parts.tensors[name]
        if tensor.role == "activation":
            raise CannotRepeatError(f"{self._from} reads {name}, which it was not given")
        if tensor.fqn is None or not tensor.fqn.startswith(f"{self._from}."):
            return name  # something all blocks share
        own = self.moved(tensor.fqn)
        return self._parts.own.get(own, own)

    def append(self, op: Op) -> None:
        parts = self._parts
        if formulas.is_inplace(op):
            raise CannotRepeatError(f"{op.name} writes in place")
        path = self.moved(op.module_path)
        name = parts.new_name(path, op.target.split(".")[1])
        outputs = tuple(name + output.removeprefix(op.name) for output in op.outputs)
        arguments = {key: self._argument(value) for key, value in op.arguments.items()}
        made = replace(op, name=name, module_path=path, outputs=outputs, arguments=arguments)
        needs_grad = any(parts.tensors[n].requires_grad for n in made.inputs)
        for old, new in zip(op.outputs, outputs, strict=True):
            self._names[old] = new
            self._storages.setdefault(old, new)
            tensor = parts.tensors[old]
            parts.tensors[new] = replace(
                tensor, name=new, storage=self._storages.get(tensor.storage, tensor.storage),
                requires_grad=tensor.is_floating and needs_grad and differentiable(op),
            )  # fmt: skip
            if old in parts.shapes:
                parts.shapes[new] = parts.shapes[old]
        if op.name in parts.arguments:
            varying = parts.arguments[op.name]
            parts.arguments[name] = {k: self._argument(value) for k, value in varying.items()}
        parts.ops.append(made)

    def _argument(self, value: Argument) -> Argument:
        if isinstance(value, Ref):
            return Ref(self.renamed(value.name))
        if isinstance(value, tuple):
            return tuple(self._argument(part) for part in value)
        return value


_NOT_DIFFERENTIABLE = frozenset(
    f"aten.{name}"
    for name in (
        "detach", "sign", "empty_like", "zeros_like", "ones_like", "rand_like", "randn_like",
        "full_like", "new_zeros", "new_ones", "new_full", "new_empty", "histc",
    )
)  # fmt: skip


def differentiable(op: Op) -> bool:
    """Return whether a gradient passes through `op` when its inputs need one."""
    return op.grad_enabled and op.kind not in _NOT_DIFFERENTIABLE
