"""Moving data under torch.distributed: the steps of an adapter that one rank takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from toolkit.errors import ToolkitError
from toolkit.plan.lower.program.sides import Message, Task
from toolkit.plan.materialize.adapter import Adapter, Step
from toolkit.plan.tensors import Mask, overlap

# (message, microbatch): what both ends of a send know.
Key = tuple[Message, int]


@dataclass
class Network:
    """What a rank has of the others: groups, and messages under way.

    `shift` is added to the ranks of the first replica to get this replica's. Messages from one
    rank are received in the order they are sent, whatever order they are needed in.
    """

    shift: int
    groups: Mapping[tuple[int, ...], dist.ProcessGroup]
    expected: Mapping[int, Sequence[tuple[Key, tuple[int, ...], torch.dtype]]]
    device: torch.device
    _sending: list[tuple[dist.Work, Tensor]] = field(default_factory=list)
    _posted: dict[int, int] = field(default_factory=dict)
    _arriving: dict[Key, tuple[dist.Work, Tensor]] = field(default_factory=dict)

    def send(self, value: Tensor, key: Key) -> None:
        """Start sending; the value is kept until it has arrived."""
        value = value.contiguous()
        work = dist.isend(value, key[0].target + self.shift)
        assert work is not None
        self._sending.append((work, value))

    def receive(self, key: Key) -> Tensor:
        """Wait for a message, having first asked for all that were sent before it."""
        source = key[0].source
        row = self.expected[source]
        while key not in self._arriving:
            at = self._posted.get(source, 0)
            if at == len(row):
                raise ToolkitError(f"nothing more is sent by rank {source}, and {key} is awaited")
            name, shape, dtype = row[at]
            value = torch.empty(shape, dtype=dtype, device=self.device)
            work = dist.irecv(value, source + self.shift)
            assert work is not None
            self._arriving[name] = (work, value)
            self._posted[source] = at + 1
        work, value = self._arriving.pop(key)
        work.wait()
        return value

    def sweep(self) -> None:
        """Forget what has arrived elsewhere."""
        self._sending = [(work, value) for work, value in self._sending if not work.is_completed()]

    def finish(self) -> None:
        """Wait until everything sent has arrived; the next step begins anew."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
        self._posted.clear()
        assert not self._arriving, f"never used: {list(self._arriving)}"

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        return self.groups[tuple(rank + self.shift for rank in ranks)]


def run(
    adapter: Adapter,
    tasks: Iterator[tuple[int, Task]],
    held: dict[str, Tensor],
    network: Network,
    rank: int,
    dtype: torch.dtype,
    key: Callable[[int, Task], Key],
) -> None:
    """Take this rank's tasks in order; `held` are its buffers by name, and gets the new ones."""
    for number, task in tasks:
        step = task.step
        if task.what == "local":
            masks = [adapter.buffer[name].mask for name in step.reads]
            values = [held[name] for name in step.reads]
            target = adapter.buffer[step.writes[0]].mask
            held[step.writes[0]] = (
                put_together(target, masks, values)
                if values
                else torch.zeros(target.shape, dtype=dtype, device=network.device)
            )
        elif task.what == "send":
            network.send(held[step.reads[0]], key(number, task))
        elif task.what == "recv":
            held[step.writes[task.place]] = network.receive(key(number, task))
        else:
            name, value = _collective(step, rank, held, network, adapter, dtype)
            if name:
                held[name] = value


def _collective(
    step: Step,
    rank: int,
    held: Mapping[str, Tensor],
    network: Network,
    adapter: Adapter,
    dtype: torch.dtype,
) -> tuple[str, Tensor]:
    place, count = step.ranks.index(rank), len(step.ranks)
    group = network.group(step.ranks)
    if step.kind == "broadcast":
        source = step.ranks[0] + network.shift
        if place == 0:
            value = held[step.reads[0]].contiguous()
            dist.broadcast(value, source, group=group)
            return "", value
        shape = adapter.buffer[step.writes[place - 1]].mask.shape
        value = torch.empty(shape, dtype=dtype, device=network.device)
        dist.broadcast(value, source, group=group)
        return step.writes[place - 1], value
    value = held[step.reads[place]]
    name = step.writes[place]
    if step.kind == "all_reduce":
        made = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(made, group=group)
        return name, made
    assert step.dim is not None
    # A process group counts its ranks in ascending order, a step as its pieces lie.
    order = sorted(range(count), key=lambda at: step.ranks[at])
    back = sorted(range(count), key=lambda at: order[at])
    if step.kind == "all_gather":
        made = value.new_empty(count * value.numel())
        dist.all_gather_into_tensor(made, value.reshape(-1), group=group)
        return name, _joined(made.view(count, *value.shape), back, step.dim)
    if step.kind == "reduce_scatter":
        pieces = _stacked(value, order, step.dim)
        made = pieces.new_empty(pieces[0].numel())
        dist.reduce_scatter_tensor(made, pieces.reshape(-1), group=group)
        return name, made.view(pieces.shape[1:])
    assert step.kind == "all_to_all"
    assert step.to_dim is not None
    pieces = _stacked(value, order, step.to_dim)
    made = torch.empty_like(pieces)
    dist.all_to_all_single(made, pieces, group=group)
    return name, _joined(made, back, step.dim)


def _stacked(value: Tensor, order: Sequence[int], dim: int) -> Tensor:
    """The slices of a tensor along a dim, in this order one after another in memory."""
    count = len(order)
    if dim == 0 and list(order) == list(range(count)):
        return value.contiguous().view(count, value.shape[0] // count, *value.shape[1:])
    slices = value.chunk(count, dim)
    return torch.stack([slices[at] for at in order])


def _joined(pieces: Tensor, order: Sequence[int], dim: int) -> Tensor:
    """The pieces, taken in this order, as one tensor along `dim`."""
    if dim == 0 and list(order) == list(range(len(order))):
        return pieces.flatten(0, 1)
    return torch.cat([pieces[at] for at in order], dim)


def put_together(target: Mask, masks: Sequence[Mask], values: Sequence[Tensor]) -> Tensor:
    """Return the part `target` of a tensor from parts of it: zeros, and each added where it lies.

    Differentiable; parts that are exactly the target, its slices, or tile it are not copied twice.
    """
    cut = [_inside(target, mask, value) for mask, value in zip(masks, values, strict=True)]
    pieces = [(box, value) for box, value in cut if value is not None and box is not None]
    if pieces and all(box == target.box for box, _ in pieces):
        made = pieces[0][1]
        for _, value in pieces[1:]:
            made = made + value
        return made
    dims = [
        dim for dim, span in enumerate(target.box) if any(box[dim] != span for box, _ in pieces)
    ]
    if len(dims) == 1 and _tiles(target, [box for box, _ in pieces], dims[0]):
        pieces.sort(key=lambda piece: piece[0][dims[0]])
        return torch.cat([value for _, value in pieces], dims[0])
    made = values[0].new_zeros(target.shape)
    for box, value in pieces:
        pad = [
            width
            for (low, high), (start, end) in zip(reversed(target.box), reversed(box), strict=True)
            for width in (start - low, high - end)
        ]
        made = made + functional.pad(value, pad)
    return made


def _tiles(target: Mask, boxes: Sequence[Any], dim: int) -> bool:
    spans = sorted(box[dim] for box in boxes)
    ends = [target.box[dim][0], *(end for _, end in spans)]
    return all(start == end for (start, _), end in zip(spans, ends, strict=False)) and (
        ends[-1] == target.box[dim][1]
    )


def _inside(target: Mask, mask: Mask, value: Tensor) -> tuple[Any, Tensor | None]:
    box = overlap(mask.box, target.box)
    if box is None:
        return None, None
    if box != mask.box:
        for dim, (start, end) in enumerate(Mask(box).within(mask)):
            if (start, end) != (0, value.shape[dim]):
                value = value.narrow(dim, start, end - start)
    return box, value
