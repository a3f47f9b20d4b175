"""Rules for dims.annotation, continued: operators that make an element from around its place.

Convolutions, pools and shifts split along an image's rows with a halo (see dims.Halo).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from toolkit.ir.dims import Axis, Builder, Halo, Spec
from toolkit.ir.graph import Argument
from toolkit.ir.splits import bias, place, rule


@rule("conv1d", "conv2d", "conv3d")
def _conv(b: Builder) -> None:
    x, weight = b.shape("input"), b.shape("weight")
    if len(x) != len(weight) or b.op.arguments["groups"] != 1:
        return
    batch, c, n = b.new(x[0], "", "b"), b.new(x[1], "+", "k"), b.new(weight[0], "", "n")
    read, made = _windows(b, weight[2:])
    b.inputs = {0: (batch, c, *read), 1: (n, c, *b.fresh(weight[2:], "^"))}
    b.outputs[0] = (batch, n, *made)
    bias(b, "bias", (n,))


@rule("avg_pool2d")
def _avg_pool(b: Builder) -> None:
    given = b.op.arguments
    padded = bool(given["count_include_pad"] or given["divisor_override"])
    _pool(b, given["kernel_size"], 0.0, padded=padded)


@rule("max_pool2d")
def _max_pool(b: Builder) -> None:
    floating = b.graph.tensors[b.op.inputs[0]].is_floating
    _pool(b, b.op.arguments["kernel_size"], -math.inf, padded=floating)


def _pool(b: Builder, kernel: Sequence[int], fill: float, *, padded: bool) -> None:
    lead = b.fresh(b.in_shapes[0][: -len(kernel)])
    read, made = _windows(b, kernel, fill, padded=padded)
    b.inputs[0], b.outputs[0] = (*lead, *read), (*lead, *made)


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d")
def _adaptive_pool(b: Builder) -> None:
    spatial = 1 if b.op.kind.endswith("1d") else 2
    lead = b.fresh(b.in_shapes[0][:-spatial])
    b.inputs[0] = (*lead, *b.fresh(b.in_shapes[0][-spatial:], "^"))
    b.outputs[0] = (*lead, *b.fresh(b.out_shapes[0][-spatial:], "^"))


def _windows(
    b: Builder, kernel: Sequence[int], fill: float = 0.0, *, padded: bool = True
) -> tuple[Spec, Spec]:
    """Return the last dims of input 0 and of the output, whose elements read windows of `kernel`.

    Those of a dim are fixed unless each holds some of the input and is where the arguments say (no
    rounding up, no padding by name). `padded` tells whether what lies outside counts as `fill`.
    """
    given = b.op.arguments
    reads: list[Axis] = []
    makes: list[Axis] = []
    for index, width in enumerate(kernel):
        size, made = (shape[index - len(kernel)] for shape in (b.in_shapes[0], b.out_shapes[0]))
        stride = _number(given["stride"], index, width)
        before = _number(given["padding"], index, 0)
        step = _number(given.get("dilation"), index, 1)
        extent = step * (width - 1) + 1
        if (
            0 <= before < extent
            and (padded or before == 0)
            and made == (size + 2 * before - extent) // stride + 1
        ):
            argument = "padding", index
            read, make = b.around(made, Halo("", size, argument, stride, extent, before, fill=fill))
        else:
            read, make = b.new(size, "^"), b.new(made, "^")
        reads.append(read)
        makes.append(make)
    return tuple(reads), tuple(makes)


def _number(given: Argument, index: int, default: int) -> int:
    """One number of an argument that has one a dim; -1 where it is none (a name, say)."""
    if given is None or given == ():
        return default
    value = given[index] if isinstance(given, tuple) and index < len(given) else -1
    return value if isinstance(value, int) else -1


@rule("roll")
def _roll(b: Builder) -> None:
    """Element i is what element i - shift was, counted around."""
    shape, given = b.in_shapes[0], b.op.arguments
    dims = [place(dim, len(shape)) for dim in given["dims"]]
    if not dims or len(set(dims)) < len(dims):  # as one long row, or a dim more than once
        b.inputs[0] = b.outputs[0] = b.fresh(shape, "^")
        return
    axes: list[tuple[Axis, Axis]] = []
    for dim, size in enumerate(shape):
        if dim in dims:
            index = dims.index(dim)
            shift = given["shifts"][index]
            halo = Halo("", size, ("shifts", index), before=shift, cyclic=True)
            axes.append(b.around(size, halo))
        else:
            axes.append((b.new(size),) * 2)
    b.inputs[0], b.outputs[0] = (tuple(several) for several in zip(*axes, strict=True))
