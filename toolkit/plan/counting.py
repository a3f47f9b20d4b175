"""Counting what a step communicates, under the names and sizes that predictions use, and checking
that the ranks fit together: who sends is received from, and collectives come in one order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.plan.lower.compat import TorchDispatchMode, group_of

_Arguments = tuple[Any, ...]


def _numel_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_numel_bytes(item) for item in value)


def _first(args: _Arguments) -> int:
    return _numel_bytes(args[0])


def _second(args: _Arguments) -> int:
    return _numel_bytes(args[1])


def _times_group(args: _Arguments) -> int:
    return _numel_bytes(args[0]) * int(args[1])


# op -> (kind, bytes of the full tensor). c10d's own ops are what FSDP2, pipelining and
# torch.distributed call; the functional ones are DTensor's; the last, those through memory.
_KINDS: Mapping[str, tuple[str, Callable[[_Arguments], int]]] = {
    "c10d.allreduce_": ("all_reduce", _first),
    "c10d.allgather_": ("all_gather", _first),
    "c10d._allgather_base_": ("all_gather", _first),
    "c10d._reduce_scatter_base_": ("reduce_scatter", _second),
    "c10d.broadcast_": ("broadcast", _first),
    "c10d.alltoall_base_": ("all_to_all", _second),
    "c10d.send": ("send", _first),
    "c10d.recv_": ("recv", _first),
    "_c10d_functional.all_reduce": ("all_reduce", _first),
    "_c10d_functional.all_reduce_": ("all_reduce", _first),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", _times_group),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", _first),
    "_c10d_functional.all_to_all_single": ("all_to_all", _first),
    "_c10d_functional.broadcast": ("broadcast", _first),
    "toolkit_c10d.all_reduce": ("all_reduce", _first),
    "toolkit_c10d.reduce_scatter": ("reduce_scatter", _first),
    "toolkit_c10d.all_gather": ("all_gather", _first),
}
_NO_TRAFFIC = {
    "_c10d_functional.wait_tensor",
    "_c10d_functional._wrap_tensor_autograd",
    "c10d.barrier",
}


class Call(NamedTuple):
    """One call on one rank: with the ranks of `group`, or with the one `peer` (else -1)."""

    kind: str
    num_bytes: int
    group: tuple[int, ...]
    peer: int = -1
    tag: int = 0


class Counter(TorchDispatchMode):
    """Counts the communication issued inside its block, on the calling rank.

    `calls` maps each kind to (count, bytes of the full tensors); `log` has the calls in order. A
    communication op that is not known is an error: it must not go uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[int, int]] = {}
        self.log: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: _Arguments = (), kwargs: Any = None
    ) -> Any:
        if "c10d" in func.namespace:
            self._count(str(func).rpartition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: _Arguments) -> None:
        if name in _NO_TRAFFIC:
            return
        if name not in _KINDS:
            raise ToolkitError(
                f"communication op {name} is not known to the counter",
                remedy="add its kind and size to toolkit/plan/counting.py",
            )
        kind, size = _KINDS[name]
        count, num_bytes = self.calls.get(kind, (0, 0))
        self.calls[kind] = (count + 1, num_bytes + size(args))
        group = group_of(args)
        ranks = tuple(dist.get_process_group_ranks(group))
        if kind in ("send", "recv"):
            self.log.append(Call(kind, size(args), ranks, ranks[int(args[2])], int(args[3])))
        else:
            self.log.append(Call(kind, size(args), ranks))


def faults(logs: Sequence[Sequence[Call]]) -> tuple[str, ...]:
    """Return where the calls of all ranks (`logs[rank]`) do not fit together; empty if they do.

    Between two ranks, the n-th send under a tag must have the size of the n-th receive; the ranks
    of a group must call its collectives in one order.

    >>> send, receive = Call("send", 8, (0, 1), peer=1), Call("recv", 4, (0, 1), peer=0)
    >>> faults([[send], [receive]])
    ('message 0 from rank 0 to 1 has 8 bytes where it is sent and 4 where it is received',)
    """
    return (*_unpaired(logs), *_disordered(logs))


def _unpaired(logs: Sequence[Sequence[Call]]) -> list[str]:
    sent: dict[tuple[int, int, int], list[int]] = {}
    received: dict[tuple[int, int, int], list[int]] = {}
    for rank, log in enumerate(logs):
        for call in log:
            if call.kind == "send":
                sent.setdefault((rank, call.peer, call.tag), []).append(call.num_bytes)
            elif call.kind == "recv":
                received.setdefault((call.peer, rank, call.tag), []).append(call.num_bytes)
    found = []
    for pair in sorted({*sent, *received}):
        out, into = sent.get(pair, []), received.get(pair, [])
        sender, receiver, _ = pair
        if len(out) != len(into):
            found.append(
                f"rank {sender} sends {len(out)} messages to rank {receiver}, which receives "
                f"{len(into)}"
            )
            continue
        found += [
            f"message {place} from rank {sender} to {receiver} has {size} bytes where it is sent "
            f"and {other} where it is received"
            for place, (size, other) in enumerate(zip(out, into, strict=True))
            if size != other
        ][:1]
    return found


def _disordered(logs: Sequence[Sequence[Call]]) -> list[str]:
    groups: dict[tuple[int, ...], dict[int, list[Call]]] = {}
    for rank, log in enumerate(logs):
        for call in log:
            if call.kind not in ("send", "recv"):
                groups.setdefault(call.group, {}).setdefault(rank, []).append(call)
    found = []
    for ranks, calls in sorted(groups.items()):
        first, *others = ranks
        for other in others:
            pairs = itertools.zip_longest(calls.get(first, []), calls.get(other, []))
            for place, (one, two) in enumerate(pairs):
                if one != two:
                    found.append(
                        f"collective {place} of ranks {list(ranks)} is {_name(one)} on rank "
                        f"{first} and {_name(two)} on rank {other}"
                    )
                    break
    return found


def _name(call: Call | None) -> str:
    return f"{call.kind} of {call.num_bytes} bytes" if call else "none"
