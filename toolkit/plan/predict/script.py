"""Script: all that the ranks of a plan do in one step, before anything is timed.

One rank stands for each position of the pipeline axis; those that differ from it along other axes
do the same. From a script follow the events (events.py), the traffic (traffic.py) and what is
held over time (memory.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from toolkit.hardware.device import Device
from toolkit.ir.graph import OpGraph, Tensor
from toolkit.plan import chain
from toolkit.plan.chain import Segment
from toolkit.plan.order.action import Action
from toolkit.plan.order.pipeline import Order
from toolkit.plan.plan import Offload, Plan, Traffic
from toolkit.plan.predict.alive import Alive, Life
from toolkit.plan.predict.costs import Call, Costs, Stream
from toolkit.plan.predict.passes import OpCalls, Passes, Piece
from toolkit.plan.predict.units import Unit, units

# Above this, an action is one task as long as it takes alone.
_MOST_PIECES = 4096


@dataclass(frozen=True)
class Use:
    """A unit in a stage: gathered for its first piece, reduced when that piece's backward ends.

    What is used by a single stretch of pieces (`first` to `last`) is gathered again for backward;
    the root stays gathered.
    """

    unit: Unit
    first: int
    last: int

    @property
    def is_root(self) -> bool:
        return self.unit.name == ""


@dataclass(frozen=True)
class Held:
    """A stage at a position: its pieces, and the units whose gradients are complete with it."""

    pieces: tuple[Piece, ...]
    uses: tuple[Use, ...] = ()
    life: Life | None = None


@dataclass(frozen=True)
class Transfer:
    """What a stage's result takes to the positions of another that do not hold it."""

    sender: int
    receivers: tuple[int, ...]
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Sum:
    """A parameter several positions hold (a tied embedding): its gradients are added at the end."""

    name: str
    positions: tuple[int, ...]
    call: Call


@dataclass(frozen=True)
class Script:
    """`held[stage, position]`; `transfers[stage, "F"]` leads to the next stage, "B" to the one
    before. `received_bytes` are set aside for what arrives, and with `keeps_sent` what is sent
    stays to the end of the step, as torch's pipeline runtime does it. With `prefetch` gathers run
    a piece ahead, and reductions beside computing. `reduced_bytes` of gradients are copied to be
    reduced at the end. The optimizer runs on `update_stream`; what `offload` names is in memory of
    its own where the host is `apart`, not in the device's. `traffic` is there when more is known of
    it than follows from the calls.
    """

    order: Order
    ranks: tuple[int, ...]
    held: Mapping[tuple[int, int], Held]
    transfers: Mapping[tuple[int, str], Transfer] = field(default_factory=dict)
    sums: tuple[Sum, ...] = ()
    update_s: tuple[float, ...] = ()
    received_bytes: tuple[int, ...] = ()
    reduced_bytes: tuple[int, ...] = ()
    keeps_sent: bool = False
    prefetch: bool = True
    offload: Offload = "none"
    update_stream: Stream = "compute"
    apart: bool = True
    traffic: tuple[Traffic, ...] | None = None

    @cached_property
    def is_long(self) -> bool:
        """Whether there is so much to run that one task must stand for an action's pieces."""
        return (
            sum(
                len(self.held[action.stage, position].pieces)
                for position, row in enumerate(self.order.rows)
                for action in row
            )
            > _MOST_PIECES
        )

    @cached_property
    def previous(self) -> Mapping[tuple[Action, int], Action]:
        """What comes before an action in the row of a position; nothing before the first."""
        return {
            (action, position): before
            for position, row in enumerate(self.order.rows)
            for before, action in pairwise(row)
        }

    def units(self, position: int) -> Iterator[Unit]:
        """Yield the units of all stages at a position."""
        for (_, place), held in self.held.items():
            if place == position:
                yield from (use.unit for use in held.uses)


def of(plan: Plan, local: OpGraph, calls: OpCalls, costs: Costs) -> Script:
    """Return the script of a plan; `local` is the graph of one rank's shapes and microbatch."""
    order = plan.table
    stages = chain.stage_segments(local, [stage.begins_at for stage in plan.stages])
    kinds = {action.kind for row in order.rows for action in row}
    borders = _borders(plan, local)
    alive = Alive(local, costs.kernels)
    lives = [
        alive.life(
            segments,
            plan.recompute,
            [tensor.name for tensor in leaving],
            halves="I" in kinds,
        )
        for segments, leaving in zip(stages, (*borders, ()), strict=True)
    ]
    held: dict[tuple[int, int], Held] = {}
    updates = []
    made: dict[Device, Passes] = {}
    for position, device in enumerate(costs.devices):
        passes = made.setdefault(device, Passes(local, costs, calls, position))
        taken: set[str] = set()
        updated = num_split = 0
        for stage in plan.held_stages(position):
            pieces = tuple(
                passes.piece(
                    segment,
                    kinds=kinds,
                    recompute=segment.path in plan.recompute,
                )
                for segment in stages[stage]
            )
            own = [t for t in parameters(plan, local, stages[stage]) if t.name not in taken]
            taken.update(tensor.name for tensor in own)
            found = units(plan, local, costs, position, own)
            updated += sum(unit.updated_bytes for unit in found.values())
            num_split += _num_split(plan, own)
            uses = tuple(_use(unit, stages[stage]) for unit in found.values() if unit.parameters)
            held[stage, position] = Held(pieces, uses, lives[stage])
        updates.append(costs.update_s(updated, position, num_split=num_split))
    transfers = _transfers(order, borders, costs)
    return Script(
        order=order,
        ranks=costs.ranks,
        held=held,
        transfers=transfers,
        received_bytes=_received(order, transfers),
        keeps_sent=True,
        sums=(
            *_sums(plan, local, stages, costs),
            *(Sum("partial gradients", (0,), call) for call in calls.at_end),
        ),
        update_s=tuple(updates),
        # gloo's gathers are waited for where they are issued; on a GPU they run ahead by a piece.
        prefetch=not costs.is_cpu,
        offload=plan.offload,
        update_stream=costs.update_stream,
        apart=not costs.is_cpu,
    )


def _num_split(plan: Plan, held: Sequence[Tensor]) -> int:
    """How many trained parameters are DTensors on the native rung."""
    if plan.offload == "optimizer":
        return 0  # on the host they are plain tensors
    trained = [tensor.fqn or tensor.name for tensor in held if tensor.requires_grad]
    if plan.placed("shard"):
        return len(trained)
    split = {*plan.placed("column"), *plan.placed("row")} if plan.size("tensor") > 1 else set()
    return sum(name.rpartition(".")[0] in split for name in trained)


def parameters(plan: Plan, graph: OpGraph, segments: Sequence[Segment]) -> tuple[Tensor, ...]:
    """Return the parameters a stage of these segments holds: all that it reads; a plan's only
    stage also holds those that nothing reads.
    """
    if len(plan.stages) == 1:
        return graph.parameters()
    names = {name for segment in segments for op in segment.ops for name in op.inputs}
    return tuple(tensor for tensor in graph.parameters() if tensor.name in names)


def _use(unit: Unit, segments: Sequence[Segment]) -> Use:
    """Where a unit's module runs in a stage."""
    if not unit.name:
        return Use(unit, 0, len(segments) - 1)
    places = [
        place
        for place, segment in enumerate(segments)
        if any(f"{op.module_path}.".startswith(f"{unit.name}.") for op in segment.ops)
    ]
    return Use(unit, places[0], places[-1]) if places else Use(unit, 0, len(segments) - 1)


def _borders(plan: Plan, local: OpGraph) -> tuple[tuple[Tensor, ...], ...]:
    """What crosses from each stage to the next."""
    found = []
    for stage in plan.stages[1:]:
        assert stage.begins_at is not None
        found.append(chain.crossing(local, stage.begins_at))
    return tuple(found)


def _transfers(
    order: Order, borders: Sequence[Sequence[Tensor]], costs: Costs
) -> dict[tuple[int, str], Transfer]:
    found: dict[tuple[int, str], Transfer] = {}
    for stage, tensors in enumerate(borders, start=1):
        there, here = order.placement[stage - 1], order.placement[stage]
        forward = _transfer(there, here, [tensor.num_bytes for tensor in tensors], costs)
        if forward:
            found[stage - 1, "F"] = forward
        gradients = [tensor.num_bytes for tensor in tensors if tensor.requires_grad]
        back = _transfer(here, there, gradients, costs)
        if back and stage - 1 not in order.no_grad:
            found[stage, "B"] = back
    return found


def _received(order: Order, transfers: Mapping[tuple[int, str], Transfer]) -> tuple[int, ...]:
    """Bytes set aside at each position: torch's stages have a buffer for every microbatch."""
    found = [0] * len(order.rows)
    for transfer in transfers.values():
        for position in transfer.receivers:
            size = sum(call.num_bytes for call in transfer.calls)
            found[position] += size * order.num_microbatches
    return tuple(found)


def _transfer(
    holders: tuple[int, ...], users: tuple[int, ...], sizes: Sequence[int], costs: Costs
) -> Transfer | None:
    receivers = tuple(position for position in users if position not in holders)
    if not receivers or not sizes:
        return None
    sender = holders[0]
    if len(receivers) == 1:
        return Transfer(
            sender, receivers, tuple(costs.send(size, sender, receivers[0]) for size in sizes)
        )
    ranks = [costs.ranks[position] for position in (sender, *receivers)]
    return Transfer(
        sender, receivers, tuple(costs.call("broadcast", size, ranks) for size in sizes)
    )


def _sums(
    plan: Plan, graph: OpGraph, stages: Sequence[Sequence[Segment]], costs: Costs
) -> Iterator[Sum]:
    holders: dict[str, set[int]] = {}
    for stage, segments in enumerate(stages):
        devices = plan.stages[stage].devices
        for tensor in parameters(plan, graph, segments):
            # Over several positions a stage's parameters are split, not shared.
            holders.setdefault(tensor.name, set()).update(devices[:1])
    for name, positions in holders.items():
        if len(positions) > 1:
            ranks = [costs.ranks[position] for position in sorted(positions)]
            call = costs.call("all_reduce", graph.tensors[name].num_bytes, ranks)
            yield Sum(graph.tensors[name].fqn or name, tuple(sorted(positions)), call)
