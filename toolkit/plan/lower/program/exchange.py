"""Exchanges: how what one stage makes of a tensor reaches those who read it, and its gradient back.

One exchange is all of a tensor between two stages (or within one). Equal ones are worked out once:
the blocks of a model repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from toolkit.hardware.cluster import Cluster
from toolkit.plan.lower.program.write import Written
from toolkit.plan.materialize import Adapter, materialize
from toolkit.plan.materialize.gradient import mirror
from toolkit.plan.materialize.regular import together
from toolkit.plan.program.part import Part
from toolkit.plan.tensors import Mask, PTensor, VTensor


class Slot(NamedTuple):
    """Readings of one part of a tensor on one rank whose gradients may be added up there.

    They are replicated over the same ranks (`alike`), so their sum is too.
    """

    rank: int
    mask: Mask
    alike: tuple[int, ...]


@dataclass(frozen=True)
class Exchange:
    """`made[i]` is (rank, mask) of what input i of `forward` holds; `wanted[i]` of output i.

    In backward, input i of `backward` is the part `shares[i][1]` of what slot `shares[i][0]` made;
    output i is the gradient of `made[i]`. `backward` is None where there is no gradient.
    """

    tensor: str
    source: int
    target: int
    made: tuple[tuple[int, Mask], ...]
    wanted: tuple[tuple[int, Mask], ...]
    slots: tuple[Slot, ...]
    forward: Adapter
    shares: tuple[tuple[int, Mask], ...]
    backward: Adapter | None

    @property
    def is_local(self) -> bool:
        """Whether nothing is communicated, so that autograd alone does what is needed."""
        back = self.backward
        return not self.forward.communication and (back is None or not back.communication)


@dataclass(frozen=True)
class Known:
    """What is worked out once for equal exchanges."""

    forward: Adapter
    shares: tuple[tuple[int, Mask], ...]
    backward: Adapter | None


class Exchanges:
    """Makes exchanges for one cluster, remembering those already worked out."""

    def __init__(self, written: Written, cluster: Cluster) -> None:
        self.written = written
        self.cluster = cluster
        self._known: dict[object, Known] = {}

    def between(self, tensor: str, source: int, target: int) -> Exchange:
        """Return the exchange of a tensor that stage `source` makes and stage `target` reads."""
        written = self.written
        maker = written.graph.producer[tensor]
        place = maker.outputs.index(tensor)
        made = merged(
            (rank, written.outputs(part)[place])
            for rank, several in written.parts[source][maker.name].items()
            for part in several
        )
        return self._exchange(tensor, source, target, made, *self.readings(tensor, target))

    def weight(self, name: str, held: Sequence[tuple[int, Mask]]) -> Exchange:
        """Return the exchange of a weight between what ranks hold and the operators of all stages:
        its backward sums up the gradients, once a step.
        """
        wanted: dict[tuple[int, Mask], None] = {}
        slots: dict[Slot, None] = {}
        for stage in range(len(self.written.ops)):
            some, several = self.readings(name, stage)
            wanted.update(dict.fromkeys(some))
            slots.update(dict.fromkeys(several))
        return self._exchange(name, -1, -1, held, list(wanted), list(slots))

    def readings(self, tensor: str, stage: int) -> tuple[list[tuple[int, Mask]], list[Slot]]:
        """Return what the ranks of a stage read of a tensor, and the slots of its gradient."""
        written, graph = self.written, self.written.graph
        wanted: dict[tuple[int, Mask], None] = {}
        slots: dict[Slot, None] = {}
        for op in graph.consumers[tensor]:
            for rank, several in written.parts[stage].get(op.name, {}).items():
                for part in several:
                    for name, mask in written.reads(part):
                        if name == tensor:
                            wanted[rank, mask] = None
                            if op.name in graph.differentiated:
                                slots[slot(written, stage, rank, part, mask)] = None
        return list(wanted), list(slots)

    def _exchange(
        self,
        tensor: str,
        source: int,
        target: int,
        made: Sequence[tuple[int, Mask]],
        wanted: Sequence[tuple[int, Mask]],
        slots: Sequence[Slot],
    ) -> Exchange:
        known = self._known_one(tensor, made, wanted, slots, weight=source < 0)
        return Exchange(
            tensor, source, target, tuple(made), tuple(wanted), tuple(slots),
            known.forward, known.shares, known.backward,
        )  # fmt: skip

    def _known_one(
        self,
        tensor: str,
        made: Sequence[tuple[int, Mask]],
        wanted: Sequence[tuple[int, Mask]],
        slots: Sequence[Slot],
        *,
        weight: bool,
    ) -> Known:
        logical = self.written.logical(tensor)
        learns = self.written.graph.tensors[tensor].requires_grad and bool(slots)
        key = (
            logical.shape,
            logical.dtype,
            tuple(made),
            tuple(wanted),
            tuple(slots),
            learns,
            weight,
        )
        if key not in self._known:
            plain = PTensor("tensor", logical.shape, logical.dtype)
            learned = slots if learns else ()
            self._known[key] = self._work_out(plain, made, wanted, learned, weight=weight)
        return self._known[key]

    def _work_out(
        self,
        tensor: PTensor,
        made: Sequence[tuple[int, Mask]],
        wanted: Sequence[tuple[int, Mask]],
        slots: Sequence[Slot],
        *,
        weight: bool,
    ) -> Known:
        producers = [VTensor(tensor, mask, rank) for rank, mask in made]
        consumers = [VTensor(tensor, mask, rank) for rank, mask in wanted]
        forward = materialize(
            tensor, producers, consumers, self.cluster, absent="zero", collectives=True
        )
        if not slots:
            return Known(forward, (), None)
        readers = [VTensor(tensor, one.mask, one.rank, f"{one.mask}@{one.alike}") for one in slots]
        views = mirror(tensor, producers, readers)
        backward = materialize(
            views.tensor, views.producers, views.consumers, self.cluster, absent="zero",
            collectives=True, at_once=weight,  # a unit's weights share a buffer
        )  # fmt: skip
        shares = tuple(
            (index, view.mask) for index, view in zip(views.of, views.producers, strict=True)
        )
        return Known(forward, shares, backward)


def slot(written: Written, stage: int, rank: int, part: Part, mask: Mask) -> Slot:
    """Return the slot that a part's reading of `mask` belongs to."""
    return Slot(rank, mask, tuple(sorted(written.works(stage, part.op)[part.work])))


def merged(made: Iterable[tuple[int, Mask]]) -> list[tuple[int, Mask]]:
    """Return what ranks have made, partial sums of one box on one rank added up."""
    boxes: dict[tuple[int, object], list[Mask]] = {}
    for rank, mask in made:
        boxes.setdefault((rank, mask.box), []).append(mask)
    found = []
    for (rank, _), masks in boxes.items():
        one = together(masks, adds_up=True)
        assert one is not None, f"{masks} do not add up"
        found.append((rank, one))
    return found
