"""Attention as it really runs: what a model does only because it is being exported is undone.

Under export, transformers writes out the causal mask and repeats grouped key-value heads; running
eagerly it passes `is_causal` and `enable_gqa` instead. The traced graph is put back to the latter
where the two are shown to be equal: a mask that depends on nothing but sizes is computed and
compared with the causal one, entry for entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from toolkit import log
from toolkit.ir import formulas, interpret
from toolkit.ir.formulas import ATTENTION
from toolkit.ir.graph import Argument, Op, OpGraph, Ref

_log = log.get_logger(__name__)

# Masks are computed at this many tokens. A number in the mask's making that is larger than half of
# it might be a window that only shows on longer sequences, so such a mask is left alone.
_TOKENS = 192


def as_eager(graph: OpGraph) -> OpGraph:
    """Return `graph` with provably causal masks and repeated heads as attention's own arguments."""
    causal: dict[str, bool] = {}
    changed: dict[str, Op] = {}
    for op in graph.ops:
        if op.kind != ATTENTION or op.arguments["is_causal"]:
            continue
        mask = op.arguments["attn_mask"]
        if not isinstance(mask, Ref):
            continue
        if mask.name not in causal:
            causal[mask.name] = _is_causal(graph, mask.name)
        if causal[mask.name]:
            changed[op.name] = _unrepeated(
                replace(op, arguments={**op.arguments, "attn_mask": None, "is_causal": True}), graph
            )
    if not changed:
        return graph
    ops = tuple(changed.get(op.name, op) for op in graph.ops)
    touched = {name for op in changed for name in graph.op(op).inputs}
    return _without_dead(graph, ops, touched)


def _is_causal(graph: OpGraph, mask: str) -> bool:
    """Compute the mask, if it depends on sizes alone, and compare it with the causal one."""
    tensor = graph.tensors[mask]
    if tensor.dtype != "bool" or tensor.shape[-1] != tensor.shape[-2]:
        return False
    making = _ancestors(graph, mask)
    if making is None or any(_hides_a_window(op, graph) for op in making):
        return False
    sizes = dict.fromkeys(graph.scaling.bounds if graph.scaling else (), 2)
    if "tokens" not in sizes:
        return False
    small = graph.at(**{**sizes, "tokens": _TOKENS})
    held: dict[str, torch.Tensor] = {}
    for op in making:
        held.update(zip(op.outputs, interpret.call(small.op(op.name), held), strict=False))
    found = held[mask]
    expected = torch.ones(_TOKENS, _TOKENS, dtype=torch.bool).tril().expand_as(found)
    return bool(torch.equal(found, expected))


def _ancestors(graph: OpGraph, tensor: str) -> list[Op] | None:
    """The operators that make `tensor`, in order; None when it depends on more than sizes."""
    wanted, names = [tensor], set()
    while wanted:
        maker = graph.producer.get(wanted.pop())
        if maker is None or formulas.is_inplace(maker):
            return None
        if maker.name not in names:
            names.add(maker.name)
            wanted += maker.inputs
    return [op for op in graph.ops if op.name in names]


def _hides_a_window(op: Op, graph: OpGraph) -> bool:
    varying: Mapping[str, Argument] = {}
    if graph.scaling is not None:
        varying = graph.scaling.arguments.get(op.name, {})
    fixed = {name: value for name, value in op.arguments.items() if name not in varying}
    return any(_TOKENS // 2 < abs(number) < 2**31 for number in _numbers(tuple(fixed.values())))


def _numbers(value: Argument) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _numbers(part)


def _unrepeated(op: Op, graph: OpGraph) -> Op:
    """Give attention the grouped heads themselves where key and value repeat them."""
    found = [_before_repeat(graph, op.arguments[name].name) for name in ("key", "value")]
    if None in found:
        return op
    key, value = found
    return replace(op, arguments={**op.arguments, "key": Ref(str(key)), "value": Ref(str(value)),
                                  "enable_gqa": True})  # fmt: skip


def _before_repeat(graph: OpGraph, tensor: str) -> str | None:
    """The (batch, groups, tokens, width) tensor whose heads were repeated into `tensor`, if so."""
    merge = graph.producer.get(tensor)
    if merge is None or merge.kind not in ("aten.reshape", "aten.view"):
        return None
    repeat = graph.producer.get(merge.inputs[0])
    if repeat is None or repeat.kind != "aten.expand":
        return None
    single = repeat.inputs[0]
    batch, groups, times, tokens, width = _five(graph.tensors[repeat.outputs[0]].shape)
    if graph.tensors[single].shape != (batch, groups, 1, tokens, width) or times <= 1:
        return None
    if graph.tensors[tensor].shape != (batch, groups * times, tokens, width):
        return None
    while (maker := graph.producer.get(single)) is not None:
        source = graph.tensors[maker.inputs[0]]
        if maker.kind == "aten.unsqueeze" and source.shape == (batch, groups, tokens, width):
            return source.name
        if maker.kind != "aten.slice" or source.numel != graph.tensors[single].numel:
            return None
        single = source.name
    return None


def _five(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 5 else (0,) * 5


def _without_dead(graph: OpGraph, ops: tuple[Op, ...], touched: set[str]) -> OpGraph:
    """Drop the operators that only fed what attention no longer reads."""
    readers: dict[str, int] = dict.fromkeys(graph.tensors, 0)
    for op in ops:
        for name in set(op.inputs):
            readers[name] += 1
    dead: set[str] = set()
    wanted = list(touched)
    while wanted:
        maker = graph.producer.get(wanted.pop())
        if maker is None or maker.name in dead or formulas.is_inplace(maker):
            continue
        if any(readers[name] or name in graph.outputs for name in maker.outputs):
            continue
        dead.add(maker.name)
        for name in set(maker.inputs):
            readers[name] -= 1
            wanted.append(name)
    gone = {name for op in graph.ops if op.name in dead for name in op.outputs}
    _log.info("%s: %d operators only made masks and repeated heads", graph.name, len(dead))
    scaling = graph.scaling
    if scaling is not None:
        scaling = replace(
            scaling,
            shapes={name: shape for name, shape in scaling.shapes.items() if name not in gone},
            arguments={name: given for name, given in scaling.arguments.items()
                       if name not in dead},
        )  # fmt: skip
    return replace(
        graph,
        ops=tuple(op for op in ops if op.name not in dead),
        tensors={name: tensor for name, tensor in graph.tensors.items() if name not in gone},
        scaling=scaling,
    )
