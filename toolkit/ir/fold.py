"""Repeated blocks: eighty identical layers are one layer, eighty times.

A block is a module of a list (a numbered child: `layers.3`). Two of them are the same when they
hold the same operators, on the same shapes, wired the same way inside; which tensors flow in from
outside, and the parameters' names, do not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from toolkit.ir.graph import Argument, Op, OpGraph, Ref


@dataclass(frozen=True)
class Block:
    """One unique block: the module paths of its instances, and each instance's operators.

    `ops[i]` are the operators of `paths[i]`; the k-th of every instance correspond. `digest` is
    the structure they share.
    """

    paths: tuple[str, ...]
    module: str  # class name
    ops: tuple[tuple[str, ...], ...]
    digest: str

    @property
    def num_instances(self) -> int:
        return len(self.paths)

    @property
    def name(self) -> str:
        """What stands for all instances: the path of the first."""
        return self.paths[0]


def blocks(graph: OpGraph) -> tuple[Block, ...]:
    """Return the unique blocks in the order of their first instance.

    The outermost numbered modules that occur at least twice with the same structure are folded;
    inside those that occur once, their own numbered children are looked at.
    """
    under = _ops_under(graph)
    found: list[Block] = []
    _collect(graph, "", under, found)
    order = {op.name: index for index, op in enumerate(graph.ops)}
    return tuple(sorted(found, key=lambda block: order[block.ops[0][0]]))


def _ops_under(graph: OpGraph) -> dict[str, list[Op]]:
    """Module path -> every operator that runs inside it, nested modules included."""
    under: dict[str, list[Op]] = {}
    for op in graph.ops:
        path = op.module_path
        while True:
            under.setdefault(path, []).append(op)
            if not path:
                break
            path = path.rpartition(".")[0]
    return under


def _collect(graph: OpGraph, parent: str, under: dict[str, list[Op]], found: list[Block]) -> None:
    children: dict[str, list[str]] = {}
    for path in under:
        if path and path.rpartition(".")[0] == parent:
            children.setdefault("numbered" if _numbered(path) else "named", []).append(path)
    same: dict[str, list[str]] = {}
    for path in children.get("numbered", []):
        same.setdefault(structure(graph, under[path], path), []).append(path)
    for digest, paths in same.items():
        if len(paths) == 1:
            _collect(graph, paths[0], under, found)
            continue
        ops = tuple(tuple(op.name for op in under[path]) for path in paths)
        found.append(Block(tuple(paths), graph.modules.get(paths[0], ""), ops, digest))
    for path in children.get("named", []):
        _collect(graph, path, under, found)


def _numbered(path: str) -> bool:
    return path.rpartition(".")[2].isdigit()


def structure(graph: OpGraph, ops: Iterable[Op], path: str) -> str:
    """Return a digest of what `ops` compute, the same for every copy of a block.

    Operators are named relative to `path`; tensors made inside by who makes them; tensors from
    outside by the order in which they are first read.
    """
    local: dict[str, str] = {}
    outside = 0
    text = hashlib.sha256()

    def relative(argument: Argument) -> object:
        if isinstance(argument, Ref):
            return local[argument.name]
        if isinstance(argument, tuple):
            return tuple(relative(part) for part in argument)
        return argument

    for op in ops:
        for name in op.inputs:
            if name not in local:
                tensor = graph.tensors[name]
                inner = (tensor.fqn or "").removeprefix(path) if tensor.role == "parameter" else ""
                role = "outside" if tensor.role in ("activation", "input") else tensor.role
                local[name] = (
                    f"{role} {outside} {inner} {tensor.shape} {tensor.dtype} {tensor.requires_grad}"
                )
                outside += 1
        for index, name in enumerate(op.outputs):
            tensor = graph.tensors[name]
            local[name] = f"{op.name.removeprefix(path)}#{index}"
            view = local.get(tensor.storage, "outside") if tensor.is_view else "own"
            text.update(f"{tensor.shape} {tensor.dtype} {tensor.requires_grad} {view}".encode())
        arguments = {key: relative(value) for key, value in op.arguments.items()}
        modes = f"{op.grad_enabled} {op.autocast}"
        text.update(f"{op.name.removeprefix(path)} {op.target} {arguments} {modes}\n".encode())
    return text.hexdigest()
