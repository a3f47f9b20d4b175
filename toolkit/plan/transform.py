"""Splitting a block's Linears over the tensor axis, found in its graph and not by name.

Megatron's pattern (Shoeybi et al. 2019, section 3): Linears that read one tensor are split by
output features (columns); the split flows through what follows as long as every operator can be
done on a part of it; a Linear whose input features are thereby split (a row) ends it with a
partial sum. Such a stretch is a `Region`: identity in and all-reduce out, and backward the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from toolkit.errors import InfeasibleError
from toolkit.ir import formulas
from toolkit.ir.graph import Op, OpGraph, Tensor
from toolkit.plan.chain import Segment

_RESHAPES = {"aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten"}
_UNCHANGED = {"aten.clone", "aten.contiguous", "aten.to", "aten._to_copy", "aten.alias"}
# Work along `dim`, and leave the other dims as they are.
_ALONG_DIM = {"aten.softmax", "aten._softmax", "aten.slice", "aten.split", "aten.chunk",
              "aten.split_with_sizes", "aten.cat"}  # fmt: skip


@dataclass(frozen=True)
class Region:
    """Linears split together: module paths, and the tensors between them.

    `dims` says along which dim each tensor is split, weights included; `sizes` are the sizes that
    the degree must divide. `columns_op` is the first column Linear; `repeated` tells whether
    recomputing the block runs the forward all-reduce again.
    """

    columns: tuple[str, ...]
    row: str
    input: str
    output: str
    dims: Mapping[str, int]
    sizes: tuple[int, ...]
    columns_op: str
    repeated: bool

    @property
    def largest_degree(self) -> int:
        """Every divisor of this splits the region."""
        return math.gcd(*self.sizes)


def regions(graph: OpGraph, segments: tuple[Segment, ...], degree: int) -> tuple[Region, ...]:
    """Return the regions of all blocks. Raises InfeasibleError when there is none, or when
    `degree` does not divide one.
    """
    found = [
        region
        for segment in segments
        if segment.path is not None
        for region in _in_block(graph, segment)
    ]
    if not found:
        raise InfeasibleError(
            f"no Linears of {graph.name} can be split by columns and then rows",
            remedy="use data parallel, FSDP or a pipeline",
        )
    largest = math.gcd(*(region.largest_degree for region in found))
    for region in found:
        bad = [size for size in region.sizes if size % degree]
        if bad:
            works = [str(d) for d in range(1, largest + 1) if largest % d == 0]
            raise InfeasibleError(
                f"tensor parallel degree {degree} does not divide {min(bad)}, a size along which "
                f"{region.columns[0]} is split (heads or features)",
                remedy=f"use a degree of {', '.join(works)}",
            )
    return tuple(found)


def local(graph: OpGraph, found: tuple[Region, ...], degree: int) -> OpGraph:
    """Return the graph with the shapes one of `degree` ranks sees."""
    tensors = dict(graph.tensors)
    for region in found:
        for name, dim in region.dims.items():
            shape = list(tensors[name].shape)
            shape[dim] //= degree
            tensors[name] = replace(tensors[name], shape=tuple(shape))
    return replace(graph, tensors=tensors, scaling=None)


def _in_block(graph: OpGraph, segment: Segment) -> Iterator[Region]:
    groups: dict[str, list[Op]] = {}
    for op in segment.ops:
        if _is_linear(op, graph):
            groups.setdefault(op.inputs[0], []).append(op)
    taken: set[str] = set()
    for columns in groups.values():
        if not any(op.name in taken for op in columns):
            region = _grow(graph, segment, columns)
            if region:
                taken.update(op.name for op in segment.ops if op.module_path == region.row)
                yield region


def _is_linear(op: Op, graph: OpGraph) -> bool:
    """A Linear of a module's own weight (what the lowering can split)."""
    if op.kind != "aten.linear":
        return False
    weight = graph.tensors[op.inputs[1]]
    return weight.role == "parameter" and weight.fqn == f"{op.module_path}.weight"


def _grow(graph: OpGraph, segment: Segment, columns: list[Op]) -> Region | None:
    """Follow the split from these columns; None when it does not end in exactly one row."""
    dims: dict[str, int] = {}
    sizes: set[int] = set()
    for op in columns:
        out = graph.tensors[op.outputs[0]]
        dims[out.name] = len(out.shape) - 1
        dims.update(dict.fromkeys(op.inputs[1:], 0))
        sizes.add(out.shape[-1])
    activations = {op.outputs[0] for op in columns}
    row: Op | None = None
    for op in segment.ops:
        split = [name for name in op.inputs if name in activations]
        if not split:
            continue
        if _is_linear(op, graph):
            x = graph.tensors[op.inputs[0]]
            if row is not None or dims[x.name] != len(x.shape) - 1:
                return None
            row = op
            dims[op.inputs[1]] = 1
            continue
        found = through(op, graph, {name: dims[name] for name in split})
        if found is None:
            return None
        for name, dim in found.items():
            dims[name] = dim
            sizes.add(graph.tensors[name].shape[dim])
            activations.add(name)
    inside = {op.name for op in segment.ops}
    leaks = any(user.name not in inside for name in activations for user in graph.consumers[name])
    if row is None or leaks or activations & set(graph.outputs):
        return None
    after = segment.ops[segment.ops.index(row) + 1 :]
    return Region(
        columns=tuple(op.module_path for op in columns),
        row=row.module_path,
        input=columns[0].inputs[0],
        output=row.outputs[0],
        dims=dims,
        sizes=tuple(sorted(sizes)),
        columns_op=columns[0].name,
        repeated=any(_saves(op, graph) for op in after),
    )


def _saves(op: Op, graph: OpGraph) -> bool:
    """Whether backward of `op` needs a tensor of its forward (a sum or a view needs none)."""
    return op.kind not in ("aten.add", "aten.sub") and not formulas.moves_nothing(op, graph)


def through(op: Op, graph: OpGraph, split: Mapping[str, int]) -> dict[str, int] | None:
    """Along which dims the outputs are split when these inputs are; None when `op` needs whole
    ones.
    """
    out = graph.tensors[op.outputs[0]]
    first = graph.tensors[op.inputs[0]]
    dim: int | None = None
    if op.kind in _RESHAPES and not op.inputs[1:]:
        dim = _reshaped(first, out, split[first.name])
    elif op.kind in _UNCHANGED and not op.inputs[1:]:
        dim = split[first.name]
    elif op.kind == "aten.transpose":
        pair = [_index(op.arguments[name], first) for name in ("dim0", "dim1")]
        dim = {pair[0]: pair[1], pair[1]: pair[0]}.get(split[first.name], split[first.name])
    elif op.kind == "aten.permute":
        order = [_index(place, first) for place in op.arguments["dims"]]
        dim = order.index(split[first.name])
    elif op.kind == "aten.unsqueeze":
        place = int(op.arguments["dim"]) % len(out.shape)
        dim = split[first.name] + (place <= split[first.name])
    elif op.kind in _ALONG_DIM:
        together = set(split) == set(op.inputs) and len(set(split.values())) == 1
        along = _index(op.arguments.get("dim", 0), first)
        dim = split[first.name] if together and along != split[first.name] else None
    elif op.kind == "aten.scaled_dot_product_attention":
        heads = {split.get(name) for name in op.inputs[:3]}
        mask = [graph.tensors[name] for name in op.inputs[3:]]
        if len(heads) == 1 and heads < {*range(len(out.shape) - 2)} and not mask:
            dim = heads.pop()
    elif formulas.work(op, graph).op_class == "elementwise":
        dim = _broadcast(op, graph, out, split)
    return None if dim is None else dict.fromkeys(op.outputs, dim)


def _index(place: object, tensor: Tensor) -> int:
    assert isinstance(place, int)
    return place % len(tensor.shape)


def _reshaped(before: Tensor, after: Tensor, dim: int) -> int | None:
    """The dim of `after` whose leading part is the leading part of `dim` (heads of features)."""
    ahead = math.prod(before.shape[:dim])
    for place, size in enumerate(after.shape):
        if math.prod(after.shape[:place]) == ahead and size > 1:
            return place
    return None


def _broadcast(op: Op, graph: OpGraph, out: Tensor, split: Mapping[str, int]) -> int | None:
    """Element-wise: every input is split along the same dim of the result, or has size 1 there."""
    aligned = {dim + len(out.shape) - len(graph.tensors[name].shape) for name, dim in split.items()}
    if len(aligned) != 1:
        return None
    dim = aligned.pop()
    for name in set(op.inputs) - set(split):
        shape = graph.tensors[name].shape
        place = dim - (len(out.shape) - len(shape))
        if place >= 0 and shape[place] != 1:
            return None
    return dim
