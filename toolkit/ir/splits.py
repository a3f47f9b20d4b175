"""The rules behind dims.annotation: for every operator the zoo meets, which dims belong together.

A rule fills in a Builder. One that leaves a tensor without a spec, or whose spec does not fit its
shape, counts as no rule: the operator is then not splittable, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from toolkit.ir import einsum, formulas
from toolkit.ir.dims import Axis, Builder, Spec
from toolkit.ir.graph import Ref, refs

Rule = Callable[[Builder], None]
RULES: dict[str, Rule] = {}

# The argument that holds the output's shape, and has to shrink with it.
SHAPE_ARGUMENTS = {
    "aten.view": "size", "aten.reshape": "shape", "aten._unsafe_view": "size",
    "aten.expand": "size", "aten.zeros": "size", "aten.ones": "size", "aten.full": "size",
    "aten.empty": "size", "aten.new_zeros": "size", "aten.new_ones": "size",
    "aten.new_full": "size", "aten.new_empty": "size",
}  # fmt: skip


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the decorated function for operators such as "linear" (of aten) or "lib.op"."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name if "." in name else f"aten.{name}"] = function
        return function

    return register


def place(index: int, rank: int) -> int:
    """Return a dim counted from the front."""
    return index + rank if index < 0 else index


# One element out for one element in, shapes broadcast ---------------------------------------

_POINTWISE = " ".join(formulas.ELEMENTWISE.values())
_SAME = (
    "clone contiguous to _to_copy type_as float detach alias zeros_like ones_like full_like "
    "empty_like"
)


def broadcast(b: Builder) -> None:
    """Every input's last dims are the output's, unless they are of size 1."""
    out = b.fresh(b.out_shapes[0])
    b.outputs[0] = out
    for index, shape in enumerate(b.in_shapes):
        tail = out[len(out) - len(shape) :]
        b.inputs[index] = tuple(
            () if size == 1 else axis for axis, size in zip(tail, shape, strict=True)
        )


for _name in f"{_POINTWISE} {_SAME}".split():
    if _name not in ("native_dropout", "glu"):
        rule(_name)(broadcast)


@rule("tril", "triu")
def _triangle(b: Builder) -> None:
    broadcast(b)
    b.fixed(*b.outputs[0][-2:])


# Products ------------------------------------------------------------------------------------


@rule("linear")
def _linear(b: Builder) -> None:
    *lead, width = b.shape("input")
    rows, k = b.fresh(lead), b.new(width, "+", "k")
    n = b.new(b.shape("weight")[0], "", "n")
    b.inputs = {0: (*rows, k), 1: (n, k)}
    b.outputs[0] = (*rows, n)
    bias(b, "bias", (n,))


def bias(b: Builder, argument: str, spec: Spec) -> None:
    """Say that a tensor argument, if it was given, is added to the result."""
    if isinstance(b.op.arguments.get(argument), Ref):
        index = b.index(argument)
        b.inputs[index] = tuple(
            () if size == 1 else axis for axis, size in zip(spec, b.in_shapes[index], strict=True)
        )
        b.addends.append(index)


@rule("mm", "bmm", "matmul")
def _matmul(b: Builder) -> None:
    if len(b.in_shapes) != 2:
        return
    first, second = b.in_shapes
    if len(first) < 2 or len(second) < 2:
        return
    lead = b.fresh(b.out_shapes[0][:-2])
    m, k, n = (b.new(first[-2], "", "m"), b.new(first[-1], "+", "k"), b.new(second[-1], "", "n"))
    b.inputs = {
        0: (*_aligned(lead, first[:-2]), m, k),
        1: (*_aligned(lead, second[:-2]), k, n),
    }
    b.outputs[0] = (*lead, m, n)


def _aligned(lead: Spec, shape: Sequence[int]) -> Spec:
    tail = lead[len(lead) - len(shape) :]
    return tuple(() if size == 1 else axis for axis, size in zip(tail, shape, strict=True))


@rule("addmm", "baddbmm")
def _addmm(b: Builder) -> None:
    names = ("mat1", "mat2") if b.op.kind == "aten.addmm" else ("batch1", "batch2")
    first, second = b.shape(names[0]), b.shape(names[1])
    lead = b.fresh(first[:-2])
    m, k, n = (b.new(first[-2], "", "m"), b.new(first[-1], "+", "k"), b.new(second[-1], "", "n"))
    b.inputs = {b.index(names[0]): (*lead, m, k), b.index(names[1]): (*lead, k, n)}
    b.outputs[0] = (*lead, m, n)
    out = b.outputs[0]
    bias(b, "self", out[len(out) - len(b.shape("self")) :])


@rule("einsum")
def _einsum(b: Builder) -> None:
    ranks = [len(shape) for shape in b.in_shapes]
    labels, result = einsum.labels(b.op.arguments["equation"], ranks)
    axes: dict[str, Axis] = {}
    for index, (text, shape) in enumerate(zip(labels, b.in_shapes, strict=True)):
        for label, size in zip(text, shape, strict=True):
            if size > 1 and label not in axes:
                axes[label] = b.new(size, "" if label in result else "+", label)
        b.inputs[index] = tuple(
            axes[label] if size > 1 else () for label, size in zip(text, shape, strict=True)
        )
    b.outputs[0] = tuple(axes.get(label, ()) for label in result)


@rule("scaled_dot_product_attention")
def _attention(b: Builder) -> None:
    """Heads and batch split freely; queries too unless the mask is made inside (is_causal).

    With grouped heads the query's heads are (groups, heads a group), and groups are what splits.
    """
    query, key, value = b.shape("query"), b.shape("key"), b.shape("value")
    if len(query) != 4:
        return
    batch = b.new(query[0], "", "b")
    group = b.new(key[1], "", "g" if key[1] != query[1] else "h")
    within = b.new(query[1] // key[1], "", "n")
    t = b.new(query[2], "^" if b.op.arguments["is_causal"] else "", "t")
    s, d, e = b.new(key[2], "^", "s"), b.new(query[3], "^", "d"), b.new(value[3], "^", "e")
    heads = group + within
    b.inputs = {0: (batch, heads, t, d), 1: (batch, group, s, d), 2: (batch, group, s, e)}
    b.outputs[0] = (batch, heads, t, e)
    if isinstance(b.op.arguments["attn_mask"], Ref):
        index = b.index("attn_mask")
        full = (batch, heads, t, s)
        shape = b.in_shapes[index]
        b.inputs[index] = tuple(
            () if size == 1 else axis
            for axis, size in zip(full[4 - len(shape) :], shape, strict=True)
        )


# Along one dim -------------------------------------------------------------------------------


def _same_but(b: Builder, *dims: int) -> None:
    """Input 0 and every output correspond dim by dim; `dims` cannot be split."""
    spec = b.fresh(b.in_shapes[0])
    b.fixed(*(spec[place(dim, len(spec))] for dim in dims))
    b.inputs[0] = spec
    for index, shape in enumerate(b.out_shapes):
        b.outputs[index] = tuple(
            axis if size == was else b.new(size, "^")
            for axis, size, was in zip(spec, shape, b.in_shapes[0], strict=True)
        )


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "topk",
      "argsort", "split", "chunk", "split_with_sizes", "glu")  # fmt: skip
def _along_dim(b: Builder) -> None:
    _same_but(b, b.op.arguments["dim"])


@rule("slice", "narrow")
def _slice(b: Builder) -> None:
    dim = place(b.op.arguments["dim"], len(b.in_shapes[0]))
    whole = b.in_shapes[0] == b.out_shapes[0]
    _same_but(b, *([] if whole else [dim]))
    if whole:
        # The bounds say "everything" whatever the size only when the end is open.
        end = b.op.arguments.get("end")
        if end is None or end < 2**31:
            b.fixed(b.inputs[0][dim])


@rule("toolkit.extend")
def _extend(b: Builder) -> None:
    _same_but(b, b.op.arguments["dim"])


@rule("flip")
def _flip(b: Builder) -> None:
    _same_but(b, *b.op.arguments["dims"])


@rule("pad", "constant_pad_nd")
def _pad(b: Builder) -> None:
    padded = len(b.op.arguments["pad"]) // 2
    _same_but(b, *(-1 - index for index in range(padded)))


@rule("select")
def _select(b: Builder) -> None:
    spec = b.fresh(b.in_shapes[0])
    dim = place(b.op.arguments["dim"], len(spec))
    b.fixed(spec[dim])
    b.inputs[0] = spec
    b.outputs[0] = spec[:dim] + spec[dim + 1 :]


@rule("unbind")
def _unbind(b: Builder) -> None:
    _select(b)
    for index in range(len(b.out_shapes)):
        b.outputs[index] = b.outputs[0]


@rule("cat", "concat")
def _cat(b: Builder) -> None:
    dim = place(b.op.arguments["dim"], len(b.out_shapes[0]))
    out = list(b.fresh(b.out_shapes[0]))
    b.fixed(out[dim])
    b.outputs[0] = tuple(out)
    for index, shape in enumerate(b.in_shapes):
        if shape == (0,) != b.out_shapes[0]:  # torch ignores these, whatever the others' rank
            b.inputs[index] = b.fresh(shape, "^")
            continue
        spec = list(out)
        spec[dim] = b.new(shape[dim], "^")
        b.inputs[index] = tuple(spec)


@rule("stack")
def _stack(b: Builder) -> None:
    dim = place(b.op.arguments["dim"], len(b.out_shapes[0]))
    spec = b.fresh(b.in_shapes[0])
    b.inputs = dict.fromkeys(range(len(b.in_shapes)), spec)
    b.outputs[0] = (*spec[:dim], b.new(b.out_shapes[0][dim], "^"), *spec[dim:])


@rule("layer_norm", "rms_norm", "native_layer_norm")
def _norm(b: Builder) -> None:
    inner = len(b.op.arguments["normalized_shape"])
    spec = b.fresh(b.in_shapes[0])
    b.fixed(*spec[len(spec) - inner :])
    b.inputs[0] = b.outputs[0] = spec
    for index in range(1, len(b.in_shapes)):
        b.inputs[index] = spec[len(spec) - inner :]


@rule("sum", "mean", "amax", "amin", "var", "std", "any", "all", "linalg_vector_norm", "logsumexp")
def _reduce(b: Builder) -> None:
    """A sum of parts is a sum; of the others the parts' results do not add up."""
    spec = b.fresh(b.in_shapes[0])
    dims = b.op.arguments.get("dim")
    chosen = [dims] if isinstance(dims, int) else (dims or range(len(spec)))
    reduced = {place(dim, len(spec)) for dim in chosen}
    keep = b.op.arguments.get("keepdim", False)
    for dim in reduced:
        for name in spec[dim]:
            b.kinds[name] = "+" if b.op.kind == "aten.sum" else "^"
    b.inputs[0] = spec
    b.outputs[0] = tuple(
        () if dim in reduced else axis
        for dim, axis in enumerate(spec)
        if keep or dim not in reduced
    )


@rule("cross_entropy_loss")
def _cross_entropy(b: Builder) -> None:
    """Rows split when each gives its own loss or a sum of them; a mean of means is not the mean."""
    reduction = b.op.arguments["reduction"]  # 0 none, 1 mean, 2 sum
    logits = b.shape("self")
    if len(b.in_shapes) != 2 or len(b.in_shapes[1]) != len(logits) - 1:
        return
    spec = b.fresh(logits)
    classes = 1 if len(logits) > 1 else 0
    rows = spec[:classes] + spec[classes + 1 :]
    b.fixed(spec[classes])
    if reduction:
        for axis in rows:
            for name in axis:
                b.kinds[name] = "+" if reduction == 2 else "^"
    b.inputs = {0: spec, 1: rows}
    b.outputs[0] = () if reduction else rows


# Reading a table -----------------------------------------------------------------------------


@rule("embedding")
def _embedding(b: Builder) -> None:
    """Rows of the table do not split here: a part would have to mask the ids it does not hold."""
    table, ids = b.shape("weight"), b.shape("indices")
    v, n = b.new(table[0], "^", "v"), b.new(table[1], "", "n")
    lead = b.fresh(ids)
    b.inputs = {0: (v, n), 1: lead}
    b.outputs[0] = (*lead, n)


@rule("index")
def _index(b: Builder) -> None:
    given = b.op.arguments["indices"]
    places = [place for place, index in enumerate(given) if index is not None]
    if len(places) != 1 or len(list(refs(given))) != 1 or _is_bool(b):
        return
    source, index = b.fresh(b.in_shapes[0]), b.fresh(b.in_shapes[1])
    (place,) = places
    b.fixed(source[place])
    b.inputs = {0: source, 1: index}
    b.outputs[0] = source[:place] + index + source[place + 1 :]


def _is_bool(b: Builder) -> bool:
    return b.graph.tensors[b.op.inputs[1]].dtype == "bool"


@rule("gather")
def _gather(b: Builder) -> None:
    dim = place(b.op.arguments["dim"], len(b.in_shapes[0]))
    source, index = b.in_shapes
    out = b.fresh(index)
    b.fixed(out[dim])
    # A smaller index reads only the beginning of a dim, which a part of it would not hold.
    spec = tuple(
        axis if place != dim and size == was else b.new(was, "^")
        for place, (axis, size, was) in enumerate(zip(out, index, source, strict=True))
    )
    for axis, own in zip(out, spec, strict=True):
        if axis != own:
            b.fixed(axis)
    b.inputs = {0: spec, 1: out}
    b.outputs[0] = out
