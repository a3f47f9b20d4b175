"""Context apart from tokens: the graph of a model that keeps its keys and values in a cache.

A traced model attends from a whole sequence to itself. Serving computes a few new tokens that
attend to many cached ones. Here each self-attention's keys, values and mask pass through an
operator of our own, `toolkit.extend`, which makes `context` of `tokens`; from there on they are
`context` long. Such a graph is for costs (work, shapes, bytes): it cannot be run.
"""

from __future__ import annotations

import re
from dataclasses import replace

from toolkit.errors import UsageError
from toolkit.ir.formulas import ATTENTION
from toolkit.ir.graph import Argument, Op, OpGraph, Ref, Tensor
from toolkit.ir.scale import Evaluator, Scaling, Size

_TOKENS, _CONTEXT = "tokens", "context"
# What may lie between the cache and the attention: repeating grouped heads.
_REPEATS = frozenset({"aten.unsqueeze", "aten.expand", "aten.reshape", "aten.view", "aten.slice",
                      "aten.clone", "aten.contiguous", "aten.repeat_interleave"})  # fmt: skip


def with_cache(graph: OpGraph) -> OpGraph:
    """Return `graph` with `context` a size of its own, evaluated where context equals tokens.

    Raises UsageError when no attention of the graph is over its own tokens by the fused operator.
    """
    rewriter = _Rewriter(graph)
    for op in graph.ops:
        if op.kind == ATTENTION:
            rewriter.attention(op)
    if not rewriter.inserted:
        raise UsageError(
            f"{graph.name} cannot be evaluated at a context apart from its tokens: none of its "
            f"operators is a {ATTENTION} over {_TOKENS}",
            remedy="trace the model with its fused attention (in transformers: "
            "attn_implementation='sdpa')",
        )
    return rewriter.graph()


class _Rewriter:
    def __init__(self, graph: OpGraph) -> None:
        if graph.scaling is None or _TOKENS not in graph.scaling.bounds:
            reason = graph.fixed.get(_TOKENS, f"it has no size {_TOKENS!r}")
            raise UsageError(f"{graph.name} has no context that could vary: {reason}")
        self.old = graph
        self.shapes = dict(graph.scaling.shapes)
        self.arguments = {op: dict(given) for op, given in graph.scaling.arguments.items()}
        self.tensors = dict(graph.tensors)
        self.ops = {op.name: op for op in graph.ops}
        self.inserted: dict[str, list[Op]] = {}  # before which operator -> what is inserted
        self.made: dict[str, str] = {}  # tensor -> its extended version

    def attention(self, op: Op) -> None:
        query, key = (op.arguments[name].name for name in ("query", "key"))
        if not (self._is_tokens(query, -2) and self._is_tokens(key, -2)):
            return  # keys from elsewhere (an encoder) have a length of their own
        for argument in ("key", "value"):
            self._lengthen(op, argument)
        mask = op.arguments["attn_mask"]
        if isinstance(mask, Ref) and self._is_tokens(mask.name, -1):
            self._replace(op.name, mask.name, self._extended(mask.name, op, -1, cached=False))

    def _is_tokens(self, tensor: str, dim: int) -> bool:
        shape = self.shapes.get(tensor)
        return shape is not None and shape[dim] == Size(_TOKENS)

    def _lengthen(self, op: Op, argument: str) -> None:
        """Extend a key or value before its heads are repeated, or else just before attention."""
        chain: list[Op] = []
        name = op.arguments[argument].name
        source = name
        while (maker := self.old.producer.get(name)) is not None:
            if maker.kind not in _REPEATS or len(self.old.consumers[name]) != 1:
                break
            chain.append(maker)
            name = maker.inputs[0]
            if maker.kind == "aten.unsqueeze":
                break
        grows = [
            index for index, step in enumerate(chain)
            if self.old.tensors[step.outputs[0]].numel > self.old.tensors[step.inputs[0]].numel
        ]  # fmt: skip
        tail = chain if grows and self._dim(name) is not None else []
        if not tail:
            dim = self._dim(source)
            assert dim is not None
            self._replace(op.name, source, self._extended(source, op, dim, cached=True))
            return
        dim = self._dim(name)
        assert dim is not None
        self._replace(tail[-1].name, name, self._extended(name, tail[-1], dim, cached=True))
        for step in tail:
            self.shapes[step.outputs[0]] = _renamed(self.shapes[step.outputs[0]])
            if step.name in self.arguments:
                given = self.arguments[step.name]
                self.arguments[step.name] = {k: _renamed(value) for k, value in given.items()}

    def _dim(self, tensor: str) -> int | None:
        places = [i for i, n in enumerate(self.shapes.get(tensor, ())) if n == Size(_TOKENS)]
        return places[0] if len(places) == 1 else None

    def _extended(self, tensor: str, before: Op, dim: int, *, cached: bool) -> str:
        if tensor in self.made:
            return self.made[tensor]
        old = self.tensors[tensor]
        name = f"{before.module_path}:extend"
        count = 0
        while name in self.ops:
            count += 1
            name = f"{before.module_path}:extend.{count}"
        arguments: dict[str, Argument] = {
            "input": Ref(tensor), "dim": dim % len(old.shape), "size": old.shape[dim],
            "cached": cached,
        }  # fmt: skip
        op = Op(name, "toolkit.extend.default", arguments, 4, (name,), before.module_path,
                before.source, before.grad_enabled)  # fmt: skip
        self.ops[name] = op
        self.arguments[name] = {"size": Size(_CONTEXT)}
        self.inserted.setdefault(before.name, []).append(op)
        shape = list(self.shapes[tensor])
        shape[dim] = Size(_CONTEXT)
        self.shapes[name] = tuple(shape)
        self.tensors[name] = Tensor(
            name, old.shape, old.dtype, "activation", None, old.requires_grad, name
        )
        self.made[tensor] = name
        return name

    def _replace(self, op: str, old: str, new: str) -> None:
        def swap(value: Argument) -> Argument:
            if isinstance(value, tuple):
                return tuple(swap(part) for part in value)
            return Ref(new) if value == Ref(old) else value

        given = {name: swap(value) for name, value in self.ops[op].arguments.items()}
        self.ops[op] = replace(self.ops[op], arguments=given)

    def graph(self) -> OpGraph:
        old = self.old
        assert old.scaling is not None
        ops: list[Op] = []
        for op in old.ops:
            ops += self.inserted.get(op.name, [])
            ops.append(self.ops[op.name])
        sizes = {**old.sizes, _CONTEXT: old.sizes[_TOKENS]}
        now = Evaluator(sizes)
        tensors = {
            name: replace(tensor, shape=now(self.shapes[name])) if name in self.shapes else tensor
            for name, tensor in self.tensors.items()
        }
        low, high = old.scaling.bounds[_TOKENS]
        bounds = {**old.scaling.bounds, _CONTEXT: (low, high)}
        return replace(
            old, ops=tuple(ops), tensors=_views_follow(tensors, ops), sizes=sizes,
            scaling=Scaling(bounds, self.shapes, self.arguments),
        )  # fmt: skip


def _views_follow(tensors: dict[str, Tensor], ops: list[Op]) -> dict[str, Tensor]:
    """A view of what is now the cache is a view of the cache, not of the new tokens."""
    for op in ops:
        if not op.inputs:
            continue
        base = tensors[op.inputs[0]]
        for name in op.outputs:
            if tensors[name].is_view and tensors[name].storage != base.storage:
                tensors[name] = replace(tensors[name], storage=base.storage)
    return tensors


def _renamed(value: Argument) -> Argument:
    if isinstance(value, Size):
        return Size(re.sub(rf"\b{_TOKENS}\b", _CONTEXT, value.expression))
    if isinstance(value, tuple):
        return tuple(_renamed(part) for part in value)
    return value
