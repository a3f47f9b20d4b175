"""What every operator costs: FLOPs and compulsory bytes, by formula, for any shapes.

Matrix products, attention and convolutions count a multiply-add as 2 FLOPs and agree exactly with
torch's FlopCounterMode. The other classes are bound by the bytes they move; their FLOPs are a few
per element (`ELEMENTWISE`, `_NORM`) and only order of magnitude. Bytes are compulsory traffic:
each distinct input once (an expanded one as what it really holds), each output once.

An operator that is not here is an error, never free. To add one: docs/howto/add-an-op.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from toolkit.cost.work import OpClass, Work
from toolkit.errors import ToolkitError
from toolkit.ir import einsum
from toolkit.ir.graph import Op, OpGraph, Ref, Tensor, refs
from toolkit.ir.storage import VIEWS

Formula = Callable[[Op, OpGraph], Work]

FORMULAS: dict[str, Formula] = {}
ATTENTION = "aten.scaled_dot_product_attention"


def formula(*kinds: str) -> Callable[[Formula], Formula]:
    """Register the decorated function as the formula of operators such as "aten.linear"."""

    def register(function: Formula) -> Formula:
        for kind in kinds:
            FORMULAS[kind] = function
        return function

    return register


def work(op: Op, graph: OpGraph) -> Work:
    """Return the forward work of `op`. Raises ToolkitError, saying how to add it, when unknown."""
    found = _find(op)
    if found is None:
        path = f"{op.module_path or graph.name} ({graph.modules.get(op.module_path, '')})"
        raise unknown_op(op.target, path, op.source)
    if moves_nothing(op, graph):
        return Work("view", dtype=_dtype(graph.output_tensors(op)))
    return found(op, graph)


def check(graph: OpGraph) -> None:
    """Raise ToolkitError naming every operator of `graph` that has no formula."""
    missing: dict[str, Op] = {}
    for op in graph.ops:
        if _find(op) is None:
            missing.setdefault(op.target, op)
    if missing:
        first, *others = missing.values()
        path = f"{first.module_path or graph.name} ({graph.modules.get(first.module_path, '')})"
        raise unknown_op(first.target, path, first.source, [op.target for op in others])


def moves_nothing(op: Op, graph: OpGraph) -> bool:
    """Return whether `op` only looks at its input differently (all outputs are views of it)."""
    if is_inplace(op):
        return False
    return bool(op.outputs) and all(graph.tensors[name].is_view for name in op.outputs)


def is_inplace(op: Op) -> bool:
    """Return whether `op` writes into its first input (`aten.add_`)."""
    return op.kind.endswith("_") and not op.kind.endswith("__")


def unknown_op(
    target: str, where: str, source: str, others: list[str] | None = None
) -> ToolkitError:
    """Return the error for an operator without a formula: its name, where it is, what to do."""
    at = f" at {source}" if source else ""
    more = f" (nor {', '.join(others)})" if others else ""
    return ToolkitError(
        f"operator {target} in {where}{at} has no work formula{more}",
        remedy="an unknown operator never costs zero: add it as docs/howto/add-an-op.md shows",
    )


def _find(op: Op) -> Formula | None:
    kind = op.kind
    if kind not in FORMULAS and is_inplace(op):
        kind = kind[:-1]
    return FORMULAS.get(kind)


def read_bytes(graph: OpGraph, names: object) -> int:
    """Bytes of the distinct tensors named: of an expanded one, only what it really holds."""
    size = 0
    for name in dict.fromkeys(names):  # type: ignore[call-overload]
        tensor = graph.tensors[name]
        held = graph.tensors[tensor.storage]
        size += min(tensor.num_bytes, held.num_bytes)
    return size


def _dtype(tensors: tuple[Tensor, ...]) -> str:
    return tensors[0].dtype if tensors else "float32"


def _moving(op: Op, graph: OpGraph, op_class: OpClass, flops: float) -> Work:
    """Work that reads every input and writes every output of `op`, in the output's dtype."""
    outputs = graph.output_tensors(op)
    if is_inplace(op):
        outputs = outputs[:1]
    return Work(
        op_class,
        flops=flops,
        read_bytes=read_bytes(graph, op.inputs),
        write_bytes=sum(tensor.num_bytes for tensor in outputs),
        dtype=_dtype(outputs),
    )


def tensor_of(op: Op, graph: OpGraph, argument: str) -> Tensor:
    """Return the tensor given as `argument` of `op`."""
    given = op.arguments[argument]
    assert isinstance(given, Ref), f"{op.name}: {argument} is {given!r}"
    return graph.tensors[given.name]


def optional_tensor(op: Op, graph: OpGraph, argument: str) -> Tensor | None:
    """Return the tensor given as `argument` of `op`, or None when none was."""
    given = op.arguments.get(argument)
    return graph.tensors[given.name] if isinstance(given, Ref) else None


# Matrix products -----------------------------------------------------------------------------


@formula("aten.linear")
def _linear(op: Op, graph: OpGraph) -> Work:
    x, weight = tensor_of(op, graph, "input"), tensor_of(op, graph, "weight")
    return _moving(op, graph, "matmul", 2.0 * x.numel * weight.shape[0])


@formula("aten.mm", "aten.bmm", "aten.matmul", "aten.mv", "aten.dot")
def _matmul(op: Op, graph: OpGraph) -> Work:
    first = graph.input_tensors(op)[0]
    out = graph.tensors[op.outputs[0]]
    return _moving(op, graph, "matmul", 2.0 * out.numel * first.shape[-1])


@formula("aten.addmm", "aten.baddbmm")
def _addmm(op: Op, graph: OpGraph) -> Work:
    first = tensor_of(op, graph, "mat1" if op.kind == "aten.addmm" else "batch1")
    out = graph.tensors[op.outputs[0]]
    return _moving(op, graph, "matmul", 2.0 * out.numel * first.shape[-1])


@formula("aten.einsum")
def _einsum(op: Op, graph: OpGraph) -> Work:
    operands = [graph.tensors[name] for name in refs(op.arguments["tensors"])]
    flops = sum(2.0 * math.prod(sizes.values()) for sizes in contractions(op, graph))
    op_class: OpClass = "matmul" if len(operands) > 1 else "reduction"
    return _moving(op, graph, op_class, flops)


def contractions(op: Op, graph: OpGraph) -> list[dict[str, int]]:
    """The sizes of the labels in each pairwise product of an einsum, taken left to right."""
    operands = [graph.tensors[name] for name in refs(op.arguments["tensors"])]
    labels, result = einsum.labels(op.arguments["equation"], [len(t.shape) for t in operands])
    size: dict[str, int] = {}
    for text, tensor in zip(labels, operands, strict=True):
        for label, dim in zip(text, tensor.shape, strict=True):
            size[label] = max(dim, size.get(label, 1))
    products, held = [], set(labels[0])
    for index in range(1, len(labels)):
        together = held | set(labels[index])
        products.append({label: size[label] for label in sorted(together)})
        later = set(result).union(*labels[index + 1 :])
        held = together & later
    return products


@formula("transformers.grouped_mm_fallback", "aten._grouped_mm")
def _grouped_mm(op: Op, graph: OpGraph) -> Work:
    rows, weight = graph.input_tensors(op)[:2]
    # Every row meets one expert's matrix, whichever it is.
    return _moving(op, graph, "matmul", 2.0 * rows.numel * weight.shape[-1])


@formula(ATTENTION)
def _attention(op: Op, graph: OpGraph) -> Work:
    """Both products over all pairs: a causal mask halves a kernel's work, not what is counted."""
    query, key, value = (tensor_of(op, graph, name) for name in ("query", "key", "value"))
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return _moving(op, graph, "attention", 2.0 * pairs * (query.shape[-1] + value.shape[-1]))


def is_fused(op: Op, graph: OpGraph, kernels: str) -> bool:
    """Return whether attention runs as one kernel that never holds all scores.

    PyTorch's CPU kernel has no dropout and gives a mask no gradient (a learned position bias):
    with either, it falls back to the two products.
    """
    mask = optional_tensor(op, graph, "attn_mask")
    learned = mask is not None and mask.requires_grad
    return kernels != "cpu" or (op.arguments["dropout_p"] == 0 and not learned)


@formula("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
def _conv(op: Op, graph: OpGraph) -> Work:
    weight = tensor_of(op, graph, "weight")
    out = graph.tensors[op.outputs[0]]
    x = tensor_of(op, graph, "input")
    transposed = bool(op.arguments.get("transposed", False))
    places = x.numel * weight.shape[1] if transposed else out.numel * weight.shape[1]
    return _moving(op, graph, "conv", 2.0 * places * math.prod(weight.shape[2:]))


# Moving a part of a tensor -------------------------------------------------------------------


@formula("aten.embedding", "aten.index_select", "aten.gather", "aten.index", "aten.take_along_dim")
def _gather(op: Op, graph: OpGraph) -> Work:
    out = graph.tensors[op.outputs[0]]
    source, *indices = op.inputs
    rows = min(out.num_bytes, read_bytes(graph, [source]))
    return Work(
        "gather",
        read_bytes=rows + read_bytes(graph, [name for name in indices if name != source]),
        write_bytes=out.num_bytes,
        dtype=out.dtype,
    )


@formula(
    "aten.index_put", "aten.scatter", "aten.scatter_add", "aten.index_add", "aten.index_copy",
    "aten.slice_scatter", "aten.select_scatter", "aten.masked_scatter", "aten.copy",
)  # fmt: skip
def _scatter(op: Op, graph: OpGraph) -> Work:
    out = graph.tensors[op.outputs[0]]
    base, *given = op.inputs
    moved = read_bytes(graph, [name for name in given if name != base])
    # Out of place, the whole tensor is copied first; in place only what is given is written.
    whole = 0 if is_inplace(op) else out.num_bytes
    return Work(
        "scatter", read_bytes=moved + whole, write_bytes=whole or min(moved, out.num_bytes),
        dtype=out.dtype,
    )  # fmt: skip


@formula("toolkit.extend")
def _extend(op: Op, graph: OpGraph) -> Work:
    """Appending to a cache moves the new entries only; what is not cached is made whole."""
    x, out = graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]]
    written = x.num_bytes if op.arguments["cached"] else out.num_bytes
    return Work("copy", read_bytes=x.num_bytes, write_bytes=written, dtype=out.dtype)


# Everything that reads its inputs and writes its outputs -------------------------------------

# FLOPs an element, of the larger of input and output.
ELEMENTWISE = {
    1: "add sub rsub mul div neg abs relu clamp clamp_min clamp_max maximum minimum eq ne lt le gt "
       "ge __and__ __or__ __xor__ logical_and logical_or logical_not logical_xor bitwise_not "
       "bitwise_and bitwise_or where masked_fill floor ceil round trunc sign square floor_divide "
       "fill threshold isnan isinf isfinite addcmul lerp",
    4: "reciprocal sqrt rsqrt pow exp exp2 log log2 log1p expm1 sin cos erf fmod remainder "
       "dropout native_dropout bernoulli feature_dropout leaky_relu hardtanh relu6 hardswish "
       "hardsigmoid atan2",
    8: "sigmoid tanh silu softplus gelu mish elu logsigmoid log_sigmoid logit glu",
}  # fmt: skip
_REDUCTION = {
    1: "sum mean amax amin max min any all argmax argmin cumsum cumprod prod diff count_nonzero "
       "avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d max_pool2d histc nll_loss "
       "nll_loss_nd bincount mse_loss l1_loss",
    3: "var std var_mean norm linalg_vector_norm binary_cross_entropy_with_logits",
    8: "cross_entropy_loss logsumexp sort argsort topk cdist",
}  # fmt: skip
_NORM = {
    5: "layer_norm native_layer_norm rms_norm group_norm native_group_norm batch_norm softmax "
       "_softmax log_softmax _log_softmax native_batch_norm instance_norm normalize",
}  # fmt: skip
_COPY = {
    0: "clone contiguous reshape flatten to _to_copy type_as cat concat stack roll flip repeat "
       "repeat_interleave pad constant_pad_nd tril triu im2col one_hot tile float meshgrid "
       "broadcast_tensors rot90 pixel_shuffle pixel_unshuffle lift_fresh_copy",
}  # fmt: skip
# Made from nothing: written, not read.
_CREATION = (
    "arange zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones "
    "new_full new_empty rand randn rand_like randn_like randint eye linspace scalar_tensor "
    "randperm tril_indices triu_indices"
)


def _per_element(op_class: OpClass, flops_per_element: int) -> Formula:
    def moving(op: Op, graph: OpGraph) -> Work:
        largest = max(t.numel for t in graph.input_tensors(op) + graph.output_tensors(op))
        return _moving(op, graph, op_class, float(flops_per_element * largest))

    return moving


def _creation(op: Op, graph: OpGraph) -> Work:
    out = graph.tensors[op.outputs[0]]
    return Work("copy", write_bytes=out.num_bytes, dtype=out.dtype)


def _view(op: Op, graph: OpGraph) -> Work:
    return replace(Work("view"), dtype=_dtype(graph.output_tensors(op)))


def _register() -> None:
    tables: tuple[tuple[OpClass, dict[int, str]], ...] = (
        ("elementwise", ELEMENTWISE), ("reduction", _REDUCTION), ("norm", _NORM),
        ("copy", _COPY),
    )  # fmt: skip
    for op_class, table in tables:
        for flops, names in table.items():
            formula(*(f"aten.{name}" for name in names.split()))(_per_element(op_class, flops))
    formula(*(f"aten.{name}" for name in _CREATION.split()))(_creation)
    formula(*VIEWS)(_view)


_register()
