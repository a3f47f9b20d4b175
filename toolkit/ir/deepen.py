"""More blocks in a traced model: a stack of equal blocks is traced three deep, and its middle block
is copied. Export takes time for every parameter and every call, a copy does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby

from toolkit.ir.graph import Argument, Op, OpGraph, Ref, Tensor

# The first and the last block may meet what others do not; one stands for all between.
SHALLOW = 3
_MIDDLE, _LAST = 1, 2


def deepen(graph: OpGraph, path: str, num_blocks: int, *, name: str) -> OpGraph:
    """Return `graph`, whose list of modules at `path` has three blocks, as if it had `num_blocks`.

    The blocks are equal, run in order, each reading of the others only the one before, and what
    comes after reads the last alone; `graph` may run through them several times.
    """
    more = num_blocks - SHALLOW
    block = re.compile(rf"{re.escape(path)}\.(\d+)(?=[.:]|$)")

    def place(text: str) -> int | None:
        found = block.match(text)
        return int(found[1]) if found else None

    def by(shift: int) -> Callable[[str], str]:
        """Rename what is of a block to the one that many further."""

        def moved(text: str) -> str:
            at = place(text)
            return text if at is None else block.sub(f"{path}.{at + shift}", text, count=1)

        return moved

    def shifts(text: str) -> Iterable[int]:
        at = place(text)
        return range(more + 1) if at == _MIDDLE else (more if at == _LAST else 0,)

    def every(names: Iterable[str]) -> Iterator[tuple[str, Callable[[str], str]]]:
        """Yield each name with its renaming, copies of the middle block one after another."""
        for at, several in groupby(names, key=place):
            run = list(several)
            for shift in shifts(run[0]) if at is not None else (0,):
                for one in run:
                    yield one, by(shift)

    assert not any(place(text) is not None for text in graph.tied)
    after = by(more)
    ops: list[Op] = []
    for at, several in groupby(graph.ops, key=lambda op: place(op.module_path)):
        run = tuple(several)
        for shift in (0,) if at is None else shifts(run[0].module_path):
            # Outside the blocks only the last is read.
            reads = after if at is None else by(shift)
            ops += (_moved(op, by(shift) if at is not None else str, reads) for op in run)
    sources = [t for t, tensor in graph.tensors.items() if tensor.role != "activation"]
    made = [output for op in graph.ops for output in op.outputs]
    tensors: dict[str, Tensor] = {}
    shapes = {}
    for old, moved in (*every(sources), *every(made)):
        tensor = graph.tensors[old]
        reads = moved if place(old) is not None else after
        fqn = None if tensor.fqn is None else moved(tensor.fqn)
        tensors[moved(old)] = replace(
            tensor, name=moved(old), fqn=fqn, storage=reads(tensor.storage)
        )
        if graph.scaling is not None and old in graph.scaling.shapes:
            shapes[moved(old)] = graph.scaling.shapes[old]
    scaling = graph.scaling
    if scaling is not None:
        varying = {}
        for old, moved in every(op.name for op in graph.ops):
            if old in scaling.arguments:
                reads = moved if place(old) is not None else after
                given = scaling.arguments[old]
                varying[moved(old)] = {key: _argument(value, reads) for key, value in given.items()}
        scaling = replace(scaling, shapes=shapes, arguments=varying)
    modules = {moved(old): graph.modules[old] for old, moved in every(graph.modules)}
    outputs = tuple(after(output) for output in graph.outputs)
    return replace(
        graph, name=name, ops=tuple(ops), tensors=tensors, modules=modules, outputs=outputs,
        scaling=scaling,
    )  # fmt: skip


def _moved(op: Op, own: Callable[[str], str], reads: Callable[[str], str]) -> Op:
    arguments = {key: _argument(value, reads) for key, value in op.arguments.items()}
    return replace(
        op, name=own(op.name), module_path=own(op.module_path), arguments=arguments,
        outputs=tuple(own(output) for output in op.outputs),
    )  # fmt: skip


def _argument(value: Argument, renamed: Callable[[str], str]) -> Argument:
    if isinstance(value, Ref):
        return Ref(renamed(value.name))
    if isinstance(value, tuple):
        return tuple(_argument(part, renamed) for part in value)
    return value
