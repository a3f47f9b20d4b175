"""Operators that this executor runs otherwise than torch, because it knows more about the part.

A linear that runs again only for its backward need not compute its result; and what a lookup's
backward costs goes by the row, however narrow the co-shard of the table is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toolkit.plan.lower.program.items import Call
from toolkit.plan.lower.program.write import Written
from toolkit.plan.program import rules

Runner = Callable[..., tuple[Tensor, ...]]

# Up to here a table's columns one by one are faster than its rows (measured on CPUs).
_NARROW = 8


def runner(call: Call, written: Written) -> Runner:
    """Return the function that runs a call on what it reads."""
    annotation = written.annotations[call.op.name]
    torchs = rules.prepare(call.op, annotation, call.part.region, written.outputs(call.part))
    if call.op.kind != "aten.embedding" or not _is_plain_lookup(call):
        return torchs
    rows, columns = written.reads(call.part)[0][1].box
    whole = rows == (0, written.graph.tensors[call.op.inputs[0]].shape[0])
    if not whole or columns[1] - columns[0] > _NARROW:
        return torchs

    def look_up(table: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        if table.device.type != "cpu":
            return torchs(table, ids)
        flat = ids.reshape(-1)
        found = [column.index_select(0, flat) for column in table.unbind(1)]
        return (torch.stack(found, -1).view(*ids.shape, table.shape[1]),)

    return look_up


def _is_plain_lookup(call: Call) -> bool:
    given = call.op.arguments
    special = given.get("scale_grad_by_freq"), given.get("sparse")
    return len(call.op.inputs) == 2 and given.get("padding_idx", -1) == -1 and not any(special)


class _Unread(torch.autograd.Function):
    """A linear whose result nothing reads: shape and backward alone."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(value, weight)
        return value.new_empty(()).expand(*value.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        value, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        wants_value, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            (rows @ weight).view(value.shape) if wants_value else None,
            rows.t() @ value.reshape(-1, value.shape[-1]) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def unread(value: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """Run a linear for its backward alone; the values of what is returned mean nothing."""
    return (_Unread.apply(value, weight, bias),)
