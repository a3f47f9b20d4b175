"""What differs between two graphs, by module path: operators, parameters, work and memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass, field, replace

from toolkit.ir import backward, show
from toolkit.ir.graph import Argument, Op, OpGraph, Ref


@dataclass(frozen=True)
class Change:
    """A module that differs. `paths` are all modules that differ in just this way.

    Differences are b minus a; operators are named with the shapes they make.
    """

    paths: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    num_parameters: int
    forward_flops: float
    backward_flops: float
    forward_bytes: float
    saved_bytes: int

    @property
    def path(self) -> str:
        """The module path, its numbers replaced by `*` when several modules changed alike."""
        return ".".join(
            names[0] if len(set(names)) == 1 else "*"
            for names in zip(*(path.split(".") for path in self.paths), strict=True)
        )


def _pattern(path: str) -> str:
    return ".".join("*" if name.isdigit() else name for name in path.split("."))


def compare(a: OpGraph, b: OpGraph) -> tuple[Change, ...]:
    """Return the modules in which `a` and `b` differ; empty when they compute the same.

    The graphs' names, the order of independent operators and source lines are no difference.
    """
    ours, theirs = _own(a), _own(b)
    alike: dict[tuple[object, ...], list[str]] = {}
    changes: dict[tuple[object, ...], Change] = {}
    for path in dict.fromkeys([*ours, *theirs]):
        mine, other = ours.get(path, _Module()), theirs.get(path, _Module())
        if mine.holds == other.holds:
            continue
        before, after = mine.totals, other.totals
        change = Change(
            paths=(path,),
            added=tuple((other.holds - mine.holds).elements()),
            removed=tuple((mine.holds - other.holds).elements()),
            num_parameters=after.num_parameters - before.num_parameters,
            forward_flops=after.forward_flops - before.forward_flops,
            backward_flops=after.backward_flops - before.backward_flops,
            forward_bytes=after.forward_bytes - before.forward_bytes,
            saved_bytes=after.saved_bytes - before.saved_bytes,
        )
        key = (_pattern(path), *astuple(change)[1:])
        changes.setdefault(key, change)
        alike.setdefault(key, []).append(path)
    return tuple(replace(change, paths=tuple(alike[key])) for key, change in changes.items())


@dataclass
class _Module:
    """What a module holds and costs itself, without the modules in it."""

    holds: Counter[str] = field(default_factory=Counter)  # operators and parameters, one line each
    totals: show.Totals = field(default_factory=show.Totals)


def _own(graph: OpGraph) -> dict[str, _Module]:
    found: dict[str, _Module] = {}
    for op in graph.ops:
        module = found.setdefault(op.module_path, _Module())
        module.holds[_signature(op, graph)] += 1
        module.totals.add(show.of_op(op, graph))
    for parameter in graph.parameters():
        path, _, name = (parameter.fqn or "").rpartition(".")
        module = found.setdefault(path, _Module())
        module.holds[f"parameter {name}: {parameter.dtype} {_shape(parameter.shape)}"] += 1
        module.totals.num_parameters += parameter.numel
    for kept in backward.saved(graph):
        found[graph.op(kept.ops[0]).module_path].totals.saved_bytes += kept.num_bytes
    return found


def _signature(op: Op, graph: OpGraph) -> str:
    """The operator as one line: what it is, what it is given, what it makes."""

    def given(value: Argument) -> str:
        if isinstance(value, Ref):
            tensor = graph.tensors[value.name]
            name = (tensor.fqn or tensor.name).rpartition(".")[2]
            return _shape(tensor.shape) if tensor.role == "activation" else name
        if isinstance(value, tuple):
            return f"[{', '.join(given(part) for part in value)}]"
        return getattr(value, "value", None) or str(value)

    inputs = ", ".join(
        given(value) for value in op.arguments.values() if value is not None and value is not False
    )
    made = ", ".join(
        f"{graph.tensors[name].dtype} {_shape(graph.tensors[name].shape)}" for name in op.outputs
    )
    return f"{op.kind.removeprefix('aten.')}({inputs}) -> {made}"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
