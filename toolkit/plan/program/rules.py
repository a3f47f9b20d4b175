"""Operators that split further than by slicing alone, and how to run a part of any operator.

Three operators do a little more when they run in parts, and then split along dims that ir.dims
calls whole: a lookup in rows of a table skips the ids other parts hold, a mean over some of the
elements counts all of them, and causal attention of some of the queries reads no key after them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from toolkit.errors import ToolkitError, UsageError
from toolkit.ir import dims, splits
from toolkit.ir.dims import Annotation, Kind
from toolkit.ir.formulas import ATTENTION
from toolkit.ir.graph import Argument, Op, OpGraph, Ref
from toolkit.plan.program import halo
from toolkit.plan.tensors import Interval, Mask

if TYPE_CHECKING:
    import torch

_LOOKUP, _LOSS, _MEAN = "aten.embedding", "aten.cross_entropy_loss", "aten.mean"


# Annotations by all that they follow from; as many are kept.
_known: dict[object, Annotation] = {}
_MOST_KNOWN = 1 << 16


def annotation(op: Op, graph: OpGraph) -> Annotation:
    """Return how `op` may be split here: as ir.dims says, and what this file adds."""
    tensors = (*graph.input_tensors(op), *graph.output_tensors(op))
    key = (
        op.target,
        tuple((name, _nameless(value)) for name, value in op.arguments.items()),
        tuple((tensor.shape, tensor.dtype) for tensor in tensors),
    )
    if key not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = _annotated(op, graph)
    return _known[key]


def _nameless(argument: Argument) -> object:
    """An argument without the names of its tensors."""
    if isinstance(argument, Ref):
        return Ref
    if isinstance(argument, tuple):
        return tuple(_nameless(part) for part in argument)
    return argument


def _annotated(op: Op, graph: OpGraph) -> Annotation:
    found = dims.annotation(op, graph)
    if not found.known:
        return found
    if op.kind == _LOOKUP:
        return _summed(found, found.inputs[0][0])
    if op.kind == _MEAN:
        kept = {name for axis in found.outputs[0] for name in axis}
        return _summed(found, [name for name in found.sizes if name not in kept])
    if op.kind == ATTENTION and op.arguments["is_causal"]:
        return _queries(found)
    if op.kind == _LOSS and _is_mean(op):
        # Every part reads all targets: the mean is over those that are not ignored.
        rows = found.inputs[1]
        whole = {f"all_{name}": found.sizes[name] for axis in rows for name in axis}
        inputs = (found.inputs[0], tuple(tuple(f"all_{name}" for name in axis) for axis in rows))
        made = replace(
            found,
            inputs=inputs,
            sizes={**found.sizes, **whole},
            kinds={**found.kinds, **dict.fromkeys(whole, "^")},
        )
        return _summed(made, [name for axis in rows for name in axis[:1]])
    return found


def _queries(found: Annotation) -> Annotation:
    """Causal attention: its queries split, as each part knows which keys come before them."""
    tokens = found.outputs[0][2]
    return replace(found, kinds={**found.kinds, **dict.fromkeys(tokens, "")})


def _is_mean(op: Op) -> bool:
    return bool(op.arguments["reduction"] == 1)


def _summed(found: Annotation, names: Sequence[str]) -> Annotation:
    inner = {name for spec in found.inputs for axis in spec for name in axis[1:]}
    kinds: dict[str, Kind] = {**found.kinds}
    kinds.update({name: "+" for name in names if name not in inner})
    return replace(found, kinds=kinds)


# A part as a function of its slices.
Runner = Callable[..., tuple["torch.Tensor", ...]]


def run(
    op: Op,
    found: Annotation,
    region: Mapping[str, Interval],
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[Mask],
) -> tuple[torch.Tensor, ...]:
    """Run a part of `op` on its slices of the inputs (in the order of `Part.reads`).

    Raises UsageError for an operator that draws random numbers, ToolkitError when it cannot be run
    in parts on copies of its inputs.
    """
    _check_repeatable(op)
    return prepare(op, found, region, outputs)(*inputs)


def prepare(
    op: Op, found: Annotation, region: Mapping[str, Interval], outputs: Sequence[Mask]
) -> Runner:
    """Return the function that runs a part of `op` on its slices of the inputs, given in the order
    of `Part.reads`: everything that does not depend on their values is worked out once.
    """
    join = halo.joiner(found, region)
    if join is not None:
        part = replace(op, arguments=halo.arguments(op.arguments, found, region))
        on_whole_inputs = _prepare(part, found, region, outputs)
        return lambda *pieces: on_whole_inputs(*join(pieces))
    return _prepare(op, found, region, outputs)


def _prepare(
    op: Op, found: Annotation, region: Mapping[str, Interval], outputs: Sequence[Mask]
) -> Runner:
    places = iter(range(len(op.inputs)))
    arguments = {key: _renamed(value, places) for key, value in op.arguments.items()}
    sized = splits.SHAPE_ARGUMENTS.get(op.kind)
    if sized is not None and outputs:
        arguments[sized] = outputs[0].shape
    if op.kind == _LOOKUP and found.inputs[0][0] and found.inputs[0][0][0] in region:
        return lambda *inputs: _lookup(found, region, inputs)
    if op.kind == _LOSS and _is_mean(op) and region:
        return lambda *inputs: _loss(op, found, region, inputs)
    if op.kind == ATTENTION and op.arguments["is_causal"] and "t" in region:
        return lambda *inputs: _causal(op, region["t"], inputs)
    from toolkit.plan.program import call as calls

    part = replace(op, arguments=arguments)
    if any("@" in name for name in op.outputs):
        return lambda *inputs: _in_place(part, op, inputs)
    call = calls.caller(part)
    if op.kind == _MEAN:
        fraction = _fraction(found, region)
        return lambda *inputs: (call(*inputs)[0] * fraction,)
    return call


def _in_place(part: Op, op: Op, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    from toolkit.ir import interpret

    held = {str(index): value.clone() for index, value in enumerate(inputs)}
    return _outputs(op, held, interpret.call(part, held))


def _renamed(argument: Argument, places: Iterator[int]) -> Argument:
    """The argument with a name of its own for every place a tensor is read."""
    if isinstance(argument, Ref):
        return Ref(str(next(places)))
    if isinstance(argument, tuple):
        return tuple(_renamed(part, places) for part in argument)
    return argument


def _check_repeatable(op: Op) -> None:
    kind = op.kind.removeprefix("aten.")
    drawn = op.arguments.get("dropout_p") or (
        kind in ("dropout", "native_dropout", "feature_dropout")
        and op.arguments.get("train", True)
        and op.arguments.get("p")
    )
    if drawn or kind.startswith(("rand", "bernoulli", "multinomial", "normal")):
        raise UsageError(
            f"{op.name} draws random numbers: no two runs of it are equal",
            remedy="trace the model in eval mode, or without dropout, to verify its plan",
        )


def _outputs(
    op: Op, held: Mapping[str, torch.Tensor], results: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """What an operator that writes in place made: `op@old` is the input `old`, rewritten."""
    fresh = iter(results)
    made = []
    for name in op.outputs:
        old = name.partition("@")[2]
        if old and old not in op.inputs:
            raise ToolkitError(
                f"{op.name} writes through a view into {old}: this cannot be run in parts",
                remedy="write the model without assigning into a slice",
            )
        made.append(held[str(op.inputs.index(old))] if old else next(fresh))
    return tuple(made)


def _lookup(
    found: Annotation, region: Mapping[str, Interval], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Rows this part holds, and zeros for the ids it does not (Megatron, arXiv 1909.08053)."""
    table, ids = inputs
    local = ids - region[found.inputs[0][0][0]][0]
    absent = (local < 0) | (local >= table.shape[0])
    rows = table[local.masked_fill(absent, 0)]
    return (rows.masked_fill(absent.unsqueeze(-1), 0.0),)


def _causal(op: Op, queries: Interval, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Attention of the queries [start, end) to the keys before `end`, each to those up to itself
    (as in context parallelism by tokens: keys and values are gathered, queries stay).
    """
    import torch
    import torch.nn.functional as F  # noqa: N812

    query, key, value = inputs
    start, end = queries
    mask = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
    options = {name: op.arguments[name] for name in ("scale", "enable_gqa")}
    made = F.scaled_dot_product_attention(
        query, key[:, :, :end], value[:, :, :end], attn_mask=mask, **options
    )
    return (made,)


def _loss(
    op: Op, found: Annotation, region: Mapping[str, Interval], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The sum over this part's rows, divided by how many rows of all count."""
    import torch.nn.functional as F  # noqa: N812

    logits, targets = inputs
    counted = (targets != op.arguments["ignore_index"]).sum()
    classes = len(logits.shape) > 1
    rows = [axis for dim, axis in enumerate(found.inputs[0]) if dim != classes]
    for dim, axis in enumerate(rows):
        if axis and axis[0] in region:
            inner = math.prod(found.sizes[name] for name in axis[1:])
            low, high = region[axis[0]]
            targets = targets.narrow(dim, low * inner, (high - low) * inner)
    options = {key: op.arguments[key] for key in ("ignore_index", "label_smoothing")}
    return (F.cross_entropy(logits, targets, reduction="sum", **options) / counted,)


def _fraction(found: Annotation, region: Mapping[str, Interval]) -> float:
    """The share of the elements of a mean that a part holds."""
    shares = [
        (high - low) / found.sizes[name]
        for name, (low, high) in region.items()
        if found.kinds[name] == "+"
    ]
    return math.prod(shares)
