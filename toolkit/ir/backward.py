"""Backward work, by rule: what computing an operator's gradients costs, mirrored from forward.

A product needs one product for each operand that requires a gradient; the first layer's input
needs none. A gradient that meets another (a tensor read twice, a tied weight) is added to it.
Attention's backward in a fused kernel computes the scores again (five products, as torch's own
count of them says); unfused it is four.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from toolkit.cost.work import OpClass, Work
from toolkit.ir import formulas
from toolkit.ir.formulas import FORMULAS, read_bytes, tensor_of
from toolkit.ir.graph import Op, OpGraph, Tensor, refs
from toolkit.ir.saved import Kernels, Saved, kept, saved

__all__ = ["Kernels", "Saved", "gradients", "kept", "rule", "saved", "work"]

_Rule = Callable[[Op, OpGraph, Kernels], Iterator[Work]]
_RULES: dict[str, _Rule] = {}


def work(op: Op, graph: OpGraph, *, kernels: Kernels = "cuda") -> tuple[Work, ...]:
    """Return the backward work of `op`: one Work a gradient; empty when no gradient reaches it."""
    if op.name not in graph.differentiated:
        return ()
    kind = op.kind if op.kind in FORMULAS or not formulas.is_inplace(op) else op.kind[:-1]
    found = _RULES.get(kind, _mirrored)
    return (*found(op, graph, kernels), *_accumulation(op, graph))


def gradients(op: Op, graph: OpGraph) -> tuple[Tensor, ...]:
    """Return the distinct inputs of `op` whose gradient its backward computes."""
    names = dict.fromkeys(op.inputs)
    return tuple(graph.tensors[name] for name in names if graph.tensors[name].requires_grad)


def rule(*kinds: str) -> Callable[[_Rule], _Rule]:
    """Register the decorated function for operators such as "aten.linear"; others are mirrored."""

    def register(function: _Rule) -> _Rule:
        for kind in kinds:
            _RULES[kind] = function
        return function

    return register


def _grad_bytes(op: Op, graph: OpGraph) -> int:
    """Bytes of the gradients that arrive from the operator's outputs."""
    return sum(t.num_bytes for t in graph.output_tensors(op) if t.requires_grad)


def _accumulation(op: Op, graph: OpGraph) -> Iterator[Work]:
    """Adding to a gradient that a later reader of the same tensor has already left."""
    for tensor in gradients(op, graph):
        readers = [r for r in graph.consumers[tensor.name] if r.name in graph.differentiated]
        if readers[-1] is not op:
            size = tensor.num_bytes
            yield Work("elementwise", float(tensor.numel), 2.0 * size, float(size), tensor.dtype)


def _mirrored(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[Work]:
    """Read the arriving gradient and what was saved, write the gradients of the inputs."""
    forward = formulas.work(op, graph)
    written = gradients(op, graph)
    if forward.op_class == "view":
        yield from _of_view(op, graph)
        return
    given = _grad_bytes(op, graph)
    # What reads a saved tensor is bound by it; what it was made from no longer matters.
    read = given + sum(size for _, size in kept(op, graph, kernels=kernels))
    yield Work(
        _OPPOSITE.get(forward.op_class, forward.op_class),
        flops=forward.flops * (2 if forward.op_class == "norm" else max(1, len(written))),
        read_bytes=float(read),
        write_bytes=float(sum(tensor.num_bytes for tensor in written)),
        dtype=forward.dtype,
    )


_OPPOSITE: dict[OpClass, OpClass] = {"gather": "scatter", "scatter": "gather",
                                     "reduction": "elementwise"}  # fmt: skip
# Looking at a part: the gradient of the rest is zero, and has to be written.
_PARTS = frozenset(f"aten.{name}" for name in ("slice", "select", "narrow", "diagonal"))
# Looking at all parts: their gradients are put together again.
_SPLITS = frozenset(f"aten.{name}" for name in ("split", "chunk", "split_with_sizes", "unbind",
                                                "tensor_split"))  # fmt: skip


def _of_view(op: Op, graph: OpGraph) -> Iterator[Work]:
    source = graph.tensors[op.inputs[0]]
    given = _grad_bytes(op, graph)
    out = graph.tensors[op.outputs[0]]
    part = op.kind in _PARTS and out.numel < source.numel
    if part or (op.kind in _SPLITS and len(op.outputs) > 1):
        yield Work("copy", read_bytes=given, write_bytes=source.num_bytes, dtype=out.dtype)
    elif op.kind in ("aten.expand", "aten.expand_as") and out.numel > source.numel:
        yield Work("reduction", float(out.numel), given, source.num_bytes, out.dtype)
    else:
        yield Work("view", dtype=out.dtype)


def _products(
    op: Op, graph: OpGraph, flops: float, operands: Sequence[Tensor], op_class: OpClass
) -> Iterator[Work]:
    """One product for each operand that needs a gradient, from the others and the one arriving."""
    given = _grad_bytes(op, graph)
    for index, operand in enumerate(operands):
        if not operand.requires_grad:
            continue
        others = [tensor.name for i, tensor in enumerate(operands) if i != index]
        yield Work(
            op_class, flops, given + read_bytes(graph, others), operand.num_bytes, operand.dtype
        )


def _bias(op: Op, graph: OpGraph, argument: str) -> Iterator[Work]:
    bias = formulas.optional_tensor(op, graph, argument)
    if bias is not None and bias.requires_grad:
        out = graph.tensors[op.outputs[0]]
        yield Work(
            "reduction", float(out.numel), _grad_bytes(op, graph), bias.num_bytes, bias.dtype
        )


@rule("aten.linear")
def _linear(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[Work]:
    operands = [tensor_of(op, graph, "input"), tensor_of(op, graph, "weight")]
    yield from _products(op, graph, formulas.work(op, graph).flops, operands, "matmul")
    yield from _bias(op, graph, "bias")


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
def _conv(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[Work]:
    operands = [tensor_of(op, graph, "input"), tensor_of(op, graph, "weight")]
    yield from _products(op, graph, formulas.work(op, graph).flops, operands, "conv")
    yield from _bias(op, graph, "bias")


@rule("aten.mm", "aten.bmm", "aten.matmul", "aten.mv", "aten.dot")
def _matmul(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[Work]:
    operands = graph.input_tensors(op)
    yield from _products(op, graph, formulas.work(op, graph).flops, operands, "matmul")


@rule("aten.addmm", "aten.baddbmm")
def _addmm(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[Work]:
    names = ("mat1", "mat2") if op.kind == "aten.addmm" else ("batch1", "batch2")
    operands = [tensor_of(op, graph, name) for name in names]
    yield from _products(op, graph, formulas.work(op, graph).flops, operands, "matmul")
    yield from _bias(op, graph, "self")


@rule("aten.einsum")
def _einsum(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[Work]:
    operands = [graph.tensors[name] for name in refs(op.arguments["tensors"])]
    if len(operands) == 1:
        yield from _mirrored(op, graph, kernels)
        return
    yield from _products(op, graph, formulas.work(op, graph).flops, operands, "matmul")


@rule("transformers.grouped_mm_fallback", "aten._grouped_mm")
def _grouped_mm(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[Work]:
    operands = graph.input_tensors(op)[:2]
    yield from _products(op, graph, formulas.work(op, graph).flops, operands, "matmul")


@rule("aten.scaled_dot_product_attention")
def _attention(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[Work]:
    """Gradients of query and key each take a product over the score's pairs, value's too.

    And the scores' own gradient takes one with `value`; a fused kernel first makes the scores
    again.
    """
    query, key, value = (tensor_of(op, graph, name) for name in ("query", "key", "value"))
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    head, value_head = query.shape[-1], value.shape[-1]
    products = 2.0 * pairs * value_head * value.requires_grad
    if query.requires_grad or key.requires_grad:
        products += 2.0 * pairs * value_head
        products += 2.0 * pairs * head * (query.requires_grad + key.requires_grad)
    if formulas.is_fused(op, graph, kernels):
        products += 2.0 * pairs * head
    read = _grad_bytes(op, graph) + sum(n for _, n in kept(op, graph, kernels=kernels))
    written = sum(tensor.num_bytes for tensor in gradients(op, graph))
    yield Work("attention", products, float(read), float(written), query.dtype)


@rule("aten.embedding")
def _embedding(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[Work]:
    """A dense gradient of the whole table: zeros, then the rows that were read."""
    table = tensor_of(op, graph, "weight")
    rows = _grad_bytes(op, graph)
    yield Work("scatter", read_bytes=2.0 * rows, write_bytes=table.num_bytes + rows,
               dtype=table.dtype)  # fmt: skip
