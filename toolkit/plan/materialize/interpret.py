"""Run adapters on numpy arrays, rank by rank, to prove that they rebuild what they should.

Collectives are done as their definitions say, by the order of ranks and the dims alone; masks are
only used to check shapes afterwards, and to place what local steps read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from toolkit.plan.materialize.adapter import Adapter, Step
from toolkit.plan.tensors import Mask, overlap

Array = npt.NDArray[np.float64]


def run(adapter: Adapter, inputs: Sequence[Array]) -> list[Array]:
    """Return what each consumer gets when the producers hold `inputs`.

    Each rank has a memory of its own: a step that reads what its rank does not hold fails.
    """
    memory: dict[int, dict[str, Array]] = {}
    for name, value in zip(adapter.inputs, inputs, strict=True):
        _store(adapter, memory, name, value)
    for step in adapter.steps:
        values = _results(adapter, step, _read(adapter, memory, step))
        for name, value in zip(step.writes, values, strict=True):
            _store(adapter, memory, name, value)
    return [memory[adapter.buffer[name].rank][name] for name in adapter.outputs]


def _store(adapter: Adapter, memory: dict[int, dict[str, Array]], name: str, value: Array) -> None:
    buffer = adapter.buffer[name]
    held = memory.setdefault(buffer.rank, {})
    assert name not in held, f"{name} is written twice"
    assert value.shape == buffer.mask.shape, f"{name}: {value.shape} is not {buffer.mask}"
    held[name] = value


def _read(adapter: Adapter, memory: dict[int, dict[str, Array]], step: Step) -> list[Array]:
    for name in (*step.reads, *step.writes):
        assert adapter.buffer[name].rank in step.ranks, f"{name} is on no rank of {step}"
    return [memory[adapter.buffer[name].rank][name] for name in step.reads]


def _results(adapter: Adapter, step: Step, values: list[Array]) -> list[Array]:
    count = len(step.ranks)
    dim = step.dim if step.dim is not None else 0
    if step.kind == "all_gather":
        return [np.concatenate(values, dim)] * count
    if step.kind == "all_reduce":
        return [np.sum(values, axis=0)] * count
    if step.kind == "reduce_scatter":
        return np.split(np.sum(values, axis=0), count, dim)
    if step.kind == "all_to_all":
        assert step.to_dim is not None
        cut = [np.split(value, count, step.to_dim) for value in values]
        return [np.concatenate([pieces[i] for pieces in cut], dim) for i in range(count)]
    if step.kind in ("broadcast", "send"):
        return [values[0]] * (count - 1)
    target = adapter.buffer[step.writes[0]].mask
    return [_local(target, [adapter.buffer[name].mask for name in step.reads], values)]


def _local(target: Mask, masks: Sequence[Mask], values: Sequence[Array]) -> Array:
    made = np.zeros(target.shape)
    for mask, value in zip(masks, values, strict=True):
        box = overlap(mask.box, target.box)
        assert box is not None
        made[_slices(Mask(box), target)] += value[_slices(Mask(box), mask)]
    return made


def _slices(mask: Mask, holder: Mask) -> tuple[slice, ...]:
    return tuple(slice(start, end) for start, end in mask.within(holder))
