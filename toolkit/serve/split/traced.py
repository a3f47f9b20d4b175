"""From a traced graph to the kernels of a serving step: every coefficient read off the graph.

A traced graph can be evaluated at any batch, tokens and context (`ir.scale`), and what its
operators cost is bilinear in tokens and context and linear in the batch. So eight evaluations give
every coefficient exactly, and a ninth checks them. Three things are as in a serving engine and not
as in the graph: the operators between two matrix products run fused (they read what comes from
outside the run and write what is used outside it), a causal mask saves the pairs it hides, and the
head is computed for the tokens that are drawn only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import NamedTuple

from toolkit.cost.roofline import MATRIX_CLASSES
from toolkit.cost.work import OpClass
from toolkit.errors import ToolkitError, UsageError
from toolkit.ir import formulas
from toolkit.ir.graph import Op, OpGraph, item_bytes
from toolkit.serve.split.work import Kernel, ModelWork, PerCount

_EXTEND = "toolkit.extend"
# Tokens and contexts the graph is evaluated at; the check lies between them.
_TOKENS, _CONTEXT, _CHECK = (2, 4), (16, 32), (3, 24)


class _Amount(NamedTuple):
    flops: float
    moved_bytes: float


@dataclass(frozen=True)
class _Run:
    """Operators that run as one kernel: a matrix product or a gather, or what lies between them."""

    name: str
    op_class: OpClass
    dtype: str
    ops: tuple[str, ...]


def model_work(graph: OpGraph) -> ModelWork:
    """Return the kernels of a step of the decoder in `graph`, traced for inference.

    Raises UsageError for a model without a context of its own (it is not a decoder), ToolkitError
    when its work does not grow linearly with the step's counts.
    """
    if graph.training:
        raise UsageError(
            f"{graph.name} was traced for training, and serving computes no loss",
            remedy="trace it for inference",
        )
    if "tokens" not in graph.sizes:
        raise UsageError(f"{graph.name} has no tokens: it is no decoder, and cannot be served")
    base = graph.at(batch=1, tokens=_TOKENS[0], context=_CONTEXT[0])
    runs = _runs(base)
    grid = {
        (batch, tokens, context): _amounts(
            base.at(batch=batch, tokens=tokens, context=context), runs
        )
        for batch in (1, 2)
        for tokens in _TOKENS
        for context in _CONTEXT
    }
    tokens, context = _CHECK
    check = _amounts(base.at(batch=2, tokens=tokens, context=context), runs)
    kernels = []
    for index, run in enumerate(runs):
        parts = []
        for part in _Amount._fields:
            values = {at: getattr(found[index], part) for at, found in grid.items()}
            shared, own = _bilinear(values, 1), _bilinear(values, 2)
            parts.append(_per_count(shared, own))
            _verify(graph, run, shared, own, getattr(check[index], part))
        kernels.append(Kernel(run.name, run.op_class, run.dtype, parts[0], parts[1]))
    # The last product is the head; a graph with a context of its own has products.
    head = max(index for index, kernel in enumerate(kernels) if kernel.op_class == "matmul")
    kernels[head] = _head(kernels[head])
    bound = graph.scaling.bounds["tokens"][1] if graph.scaling else None
    return ModelWork(
        graph.name,
        _merged(kernels),
        weight_bytes=sum(tensor.num_bytes for tensor in graph.parameters()),
        kv_bytes_per_token=_kv_bytes(base),
        hidden_bytes=_hidden_bytes(base, runs[head].ops[0]),
        max_context=bound,
    )


# -- which operators run together ----------------------------------------------------------------


def _runs(graph: OpGraph) -> list[_Run]:
    runs: list[_Run] = []
    between: list[Op] = []

    def close() -> None:
        works = [formulas.work(op, graph) for op in between]
        if any(work.op_class != "view" for work in works):
            normed = any(work.op_class == "norm" for work in works)
            first = next(op for op, work in zip(between, works, strict=True) if work.moved_bytes)
            op_class: OpClass = "norm" if normed else "elementwise"
            dtype = works[-1].dtype
            runs.append(_Run(_name(first), op_class, dtype, tuple(op.name for op in between)))
        between.clear()

    for op in graph.ops:
        work = formulas.work(op, graph)
        # Of a gathered table only the rows asked for are read: its own formula knows.
        if work.op_class in (*MATRIX_CLASSES, "gather"):
            close()
            runs.append(_Run(_name(op), work.op_class, work.dtype, (op.name,)))
        else:
            between.append(op)
    close()
    return runs


def _name(op: Op) -> str:
    """The operator's place, the same in every layer."""
    return re.sub(r"\b\d+\b", "*", op.module_path) or op.kind


def _amounts(graph: OpGraph, runs: list[_Run]) -> list[_Amount]:
    """FLOPs and bytes of each run at the graph's sizes."""
    run_of = {name: index for index, run in enumerate(runs) for name in run.ops}
    readers: dict[str, set[int]] = defaultdict(set)
    for op in graph.ops:
        if op.name in run_of and not formulas.moves_nothing(op, graph):
            for name in op.inputs:
                readers[graph.tensors[name].storage].add(run_of[op.name])
    for name in graph.outputs:
        readers[graph.tensors[name].storage].add(-1)
    return [_amount(graph, index, run, readers) for index, run in enumerate(runs)]


def _amount(graph: OpGraph, index: int, run: _Run, readers: dict[str, set[int]]) -> _Amount:
    ops = [graph.op(name) for name in run.ops]
    if run.op_class in (*MATRIX_CLASSES, "gather"):
        work = formulas.work(ops[0], graph)
        return _Amount(work.flops, work.moved_bytes)
    flops, written = 0.0, 0
    made: set[str] = set()
    seen: set[str] = set()
    read: dict[str, int] = defaultdict(int)
    for op in ops:
        work = formulas.work(op, graph)
        if work.op_class == "view":
            continue
        flops += work.flops
        for name in op.inputs:
            tensor = graph.tensors[name]
            held = graph.tensors[tensor.storage]
            if held.name not in made and name not in seen:
                seen.add(name)
                # Several views of one tensor are read as the tensor, at most.
                read[held.name] = min(held.num_bytes, read[held.name] + tensor.num_bytes)
        made.update(op.outputs)
        if op.kind == _EXTEND:
            # The cache grows by the new entries; the rest of it stays where it is.
            written += int(work.write_bytes)
            continue
        for name in op.outputs:
            if readers[graph.tensors[name].storage] - {index}:
                written += graph.tensors[name].num_bytes
    return _Amount(flops, sum(read.values()) + written)


def _kv_bytes(graph: OpGraph) -> int:
    """Bytes a token adds to the cache; `graph` is evaluated at a batch of one."""
    appended = sum(
        graph.tensors[op.inputs[0]].num_bytes
        for op in graph.ops
        if op.kind == _EXTEND and op.arguments["cached"]
    )
    return appended // graph.sizes["tokens"]


def _hidden_bytes(graph: OpGraph, head: str) -> int:
    """Bytes of one token's hidden state, which is what the head reads of it."""
    tensor = graph.input_tensors(graph.op(head))[0]
    return tensor.shape[-1] * item_bytes(tensor.dtype)


# -- from values to coefficients ------------------------------------------------------------------

_Bilinear = tuple[float, float, float, float]  # of 1, tokens, context, tokens * context


def _bilinear(values: dict[tuple[int, int, int], float], batch: int) -> _Bilinear:
    (t0, t1), (c0, c1) = _TOKENS, _CONTEXT
    f00, f01 = values[batch, t0, c0], values[batch, t0, c1]
    f10, f11 = values[batch, t1, c0], values[batch, t1, c1]
    both = (f11 - f10 - f01 + f00) / ((t1 - t0) * (c1 - c0))
    tokens = (f10 - f00) / (t1 - t0) - both * c0
    context = (f01 - f00) / (c1 - c0) - both * t0
    return f00 - tokens * t0 - context * c0 - both * t0 * c0, tokens, context, both


def _per_count(one: _Bilinear, two: _Bilinear) -> PerCount:
    """Coefficients from the work of one sequence and of two: what two share is the step's.

    Of the shared part only the constant (the weights) is shared between sequences of different
    lengths; a table made for each position is made for each of theirs.
    """
    return PerCount(
        constant=_clean(2 * one[0] - two[0]),
        sequences=_clean(two[0] - one[0]),
        tokens=_clean(one[1]),
        context=_clean(one[2]),
        pairs=_clean(one[3]),
    )


def _clean(value: float) -> float:
    # Differences of large whole numbers: what is left below a thousandth is rounding.
    return 0.0 if abs(value) < 1e-3 else value


def _verify(graph: OpGraph, run: _Run, one: _Bilinear, two: _Bilinear, found: float) -> None:
    tokens, context = _CHECK
    said = sum(
        part * at for part, at in zip(two, (1, tokens, context, tokens * context), strict=True)
    )
    if abs(said - found) > 1e-6 * max(abs(found), 1.0):
        raise ToolkitError(
            f"{run.name} of {graph.name} does not grow linearly with tokens and context: {found:g} "
            f"where {said:g} was expected",
            remedy="serving's cost model is for decoders of full causal attention",
        )


def _head(kernel: Kernel) -> Kernel:
    """The last product gives logits: computed for the tokens drawn, not for all."""

    def moved(amount: PerCount) -> PerCount:
        return replace(amount, tokens=0.0, samples=amount.tokens)

    return replace(kernel, flops=moved(kernel.flops), moved_bytes=moved(kernel.moved_bytes))


def _merged(kernels: list[Kernel]) -> tuple[Kernel, ...]:
    """Equal kernels once, with how often a step launches them."""
    found: dict[Kernel, Kernel] = {}
    for kernel in kernels:
        key = replace(kernel, name="")
        known = found.get(key)
        found[key] = replace(known, count=known.count + 1) if known else kernel
    return tuple(found.values())
