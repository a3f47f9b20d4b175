"""Saved activations: the tensors autograd keeps from the forward pass until the backward pass.

A rule names what an operator saves: an argument, its `result` (or `result1`, its second output),
or a tensor made inside it. "other if self" reads: `other` is kept when `self` needs a gradient.
The rules follow the derivative formulas of PyTorch's eager autograd; parameters, buffers and
inputs are alive anyway and not counted. Memory is counted once a storage, and whole: a saved view
keeps all of what it looks at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from toolkit.errors import ToolkitError
from toolkit.ir import formulas
from toolkit.ir.graph import Op, OpGraph, item_bytes, refs

# Which kernels run decides what some operators save (dropout's mask, attention's scores).
Kernels = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Saved:
    """One piece of memory kept for the backward pass, and the operators that keep it.

    `name` is the tensor that owns the memory, or `<op>!<what>` for one made inside an operator.
    """

    name: str
    num_bytes: int
    ops: tuple[str, ...]


@dataclass(frozen=True)
class Inner:
    """A tensor that exists only inside an operator."""

    what: str
    num_bytes: int


_Rule = Callable[[Op, OpGraph, Kernels], Iterator[str | Inner]]
_RULES: dict[str, _Rule] = {}

# What is saved -> the operators that save it. An empty key: nothing.
_TABLE = {
    "": "add sub rsub neg sum mean cat concat stack clone contiguous reshape flatten to _to_copy "
        "type_as float roll flip repeat pad constant_pad_nd tril triu cumsum diff "
        "view expand transpose permute unsqueeze squeeze slice select split chunk split_with_sizes "
        "unbind alias t unflatten expand_as view_as movedim swapaxes narrow mT diagonal "
        "adaptive_avg_pool1d floor ceil round trunc lift_fresh lift_fresh_copy "
        "broadcast_tensors unfold im2col "
        "slice_scatter select_scatter copy fill index_add repeat_interleave meshgrid detach "
        "adaptive_avg_pool2d tensor_split",
    "other if self, self if other": "mul matmul",
    "mat2 if self, self if mat2": "mm bmm",
    "mat2 if mat1, mat1 if mat2": "addmm",
    "batch2 if batch1, batch1 if batch2": "baddbmm",
    "other, self if other": "div",
    "input if weight, weight if input": "linear conv1d conv2d conv3d convolution",
    "self": "gelu silu log log2 log1p sin cos erf abs clamp clamp_min clamp_max pow square "
            "softplus elu hardswish leaky_relu mish var avg_pool2d glu hardtanh",
    "result": "exp sqrt rsqrt reciprocal sigmoid tanh softmax _softmax log_softmax _log_softmax "
              "relu exp2 expm1 threshold",
    "self, result": "amax amin linalg_vector_norm norm logsumexp std prod",
    "self, other": "maximum minimum atan2",
    "condition": "where",
    "mask": "masked_fill",
    "indices": "embedding index",
    "index": "gather index_select scatter_add scatter",
    "result1": "sort topk max min",
    "self if target, target": "mse_loss l1_loss",
}  # fmt: skip


def saved(graph: OpGraph, *, kernels: Kernels = "cuda") -> tuple[Saved, ...]:
    """Return the memory autograd keeps after a forward pass of `graph`, in forward order.

    Raises ToolkitError naming an operator that has no rule.
    """
    size: dict[str, int] = {}
    keepers: dict[str, list[str]] = {}
    for op in graph.ops:
        if op.name not in graph.differentiated:
            continue
        for name, num_bytes in kept(op, graph, kernels=kernels):
            size.setdefault(name, num_bytes)
            keepers.setdefault(name, []).append(op.name)
    return tuple(Saved(name, size[name], tuple(ops)) for name, ops in keepers.items())


def kept(op: Op, graph: OpGraph, *, kernels: Kernels = "cuda") -> Iterator[tuple[str, int]]:
    """Yield (storage, bytes) of what `op` alone makes autograd keep."""
    kind = op.kind[:-1] if formulas.is_inplace(op) else op.kind
    if kind not in _RULES:
        path = f"{op.module_path or graph.name} ({graph.modules.get(op.module_path, '')})"
        raise ToolkitError(
            f"operator {op.target} in {path} has no rule for what autograd saves",
            remedy="add it as docs/howto/add-an-op.md shows",
        )
    if formulas.moves_nothing(op, graph):
        return
    for found in _RULES[kind](op, graph, kernels):
        if isinstance(found, Inner):
            yield f"{op.name}!{found.what}", found.num_bytes
            continue
        tensor = graph.tensors[found]
        owner = graph.tensors[tensor.storage]
        if (
            op.autocast
            and tensor.is_floating
            and tensor.dtype != graph.tensors[op.outputs[0]].dtype
        ):
            # Autocast hands the product a cast copy, and that is what is kept, weights included.
            yield f"{owner.name}!{op.autocast}", tensor.numel * item_bytes(op.autocast)
            continue
        if owner.role == "activation":
            yield owner.name, owner.num_bytes


def rule(*names: str) -> Callable[[_Rule], _Rule]:
    """Register the decorated function for operators such as "dropout" (of aten) or "lib.op".

    It yields the names of tensors, or Inner ones, that the operator saves.
    """

    def register(function: _Rule) -> _Rule:
        for name in names:
            _RULES[name if "." in name else f"aten.{name}"] = function
        return function

    return register


def from_text(text: str) -> _Rule:
    """Return the rule that `text` says, in the words of the head of this file."""
    parts = [part.strip().split(" if ") for part in text.split(",") if part.strip()]

    def listed(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[str]:
        for what, *condition in parts:
            if condition and not _needs_grad(op, graph, condition[0]):
                continue
            if what.startswith("result"):
                yield op.outputs[int(what.removeprefix("result") or 0)]
            else:
                yield from refs(op.arguments.get(what))

    return listed


def _needs_grad(op: Op, graph: OpGraph, argument: str) -> bool:
    return any(graph.tensors[name].requires_grad for name in refs(op.arguments.get(argument)))


def _bytes(numel: int, dtype: str) -> int:
    return numel * item_bytes(dtype)


@rule("layer_norm", "native_layer_norm")
def _layer_norm(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[str | Inner]:
    x = formulas.tensor_of(op, graph, "input")
    yield x.name
    normalised = math.prod(op.arguments["normalized_shape"])
    dtype = "float32" if kernels == "cuda" else x.dtype
    yield Inner("mean", _bytes(x.numel // normalised, dtype))
    yield Inner("rstd", _bytes(x.numel // normalised, dtype))


@rule("rms_norm")
def _rms_norm(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[str | Inner]:
    x = formulas.tensor_of(op, graph, "input")
    yield x.name
    rows = x.numel // math.prod(op.arguments["normalized_shape"])
    yield Inner("rstd", _bytes(rows, "float32"))
    weight = formulas.optional_tensor(op, graph, "weight")
    if kernels == "cpu" and weight is not None and weight.requires_grad:
        yield Inner("normalised", x.num_bytes)


@rule("group_norm", "native_group_norm")
def _group_norm(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[str | Inner]:
    x = formulas.tensor_of(op, graph, "input")
    yield x.name
    groups = op.arguments.get("num_groups", op.arguments.get("group"))
    yield Inner("mean", _bytes(x.shape[0] * groups, x.dtype))
    yield Inner("rstd", _bytes(x.shape[0] * groups, x.dtype))


@rule("dropout")
def _dropout(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[Inner]:
    x = formulas.tensor_of(op, graph, "input")
    # CUDA has a fused kernel with a mask of one byte; elsewhere the noise itself is multiplied by.
    yield Inner("mask", _bytes(x.numel, "bool" if kernels == "cuda" else x.dtype))


@rule("einsum")
def _einsum(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[str]:
    names = list(refs(op.arguments["tensors"]))
    for index, name in enumerate(names):
        others = names[:index] + names[index + 1 :]
        if any(graph.tensors[other].requires_grad for other in others):
            yield name


@rule("transformers.grouped_mm_fallback", "aten._grouped_mm")
def _grouped_mm(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[str]:
    yield from op.inputs


@rule("index_put", "masked_scatter", "index_copy")
def _index_put(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[str]:
    yield from refs(op.arguments.get("indices") or op.arguments.get("index"))


@rule("cross_entropy_loss")
def _cross_entropy(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[Inner | str]:
    logits = formulas.tensor_of(op, graph, "self")
    yield Inner("log_softmax", logits.num_bytes)
    yield from refs(op.arguments["target"])
    yield Inner("total_weight", item_bytes(logits.dtype))


@rule("scaled_dot_product_attention")
def _attention(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[Inner | str]:
    query, key, value = (formulas.tensor_of(op, graph, n) for n in ("query", "key", "value"))
    mask = formulas.optional_tensor(op, graph, "attn_mask")
    rows = math.prod(query.shape[:-1])
    scores = rows * key.shape[-2]
    dropout = op.arguments["dropout_p"] > 0
    if formulas.is_fused(op, graph, kernels):
        yield from (query.name, key.name, value.name, op.outputs[0])
        yield Inner("logsumexp", _bytes(rows, "float32"))
        if mask is not None and mask.dtype == "bool":
            # A mask of yes and no becomes one of 0 and -inf, made anew for each call.
            yield Inner("mask", _bytes(mask.numel, query.dtype))
        elif mask is not None:
            yield mask.name
        return
    # Unfused: both factors scaled, the softmax of the scores, and what dropout leaves of it.
    yield Inner("scaled_query", query.num_bytes)
    yield Inner("scaled_key", key.num_bytes)
    yield Inner("weights", _bytes(scores, query.dtype))
    # The product wants batch and heads as one dim: a transposed view is copied for it.
    yield Inner("value", value.num_bytes) if value.is_view else value.name
    if dropout:
        yield Inner("dropout_mask", _bytes(scores, query.dtype))
        yield Inner("dropped", _bytes(scores, query.dtype))


@rule("toolkit.extend")
def _extend(op: Op, graph: OpGraph, kernels: Kernels) -> Iterator[str]:
    return iter(())


for _text, _names in _TABLE.items():
    rule(*_names.split())(from_text(_text))
