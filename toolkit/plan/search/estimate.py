"""What a candidate takes: seconds of a step and bytes of every position, in milliseconds of search.

The same costs and the same order of events as toolkit.plan.predict, with what repeats added up
instead of simulated; a test holds the two together. A stage's backward is followed piece by piece
where gathers and reductions run beside it, and the schedule is timed by its own table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from toolkit.cost.memory import CATEGORIES
from toolkit.plan.order.pipeline import Stage as Span
from toolkit.plan.plan import How, Offload
from toolkit.plan.search import schedules, units
from toolkit.plan.search.rows import Rows
from toolkit.plan.search.site import Site
from toolkit.plan.search.units import Unit

_MOMENTS = 2  # as predict.memory


class Stretch(NamedTuple):
    """The items of a stage, the first `again` - `begin` of which are recomputed."""

    begin: int
    end: int
    again: int


@dataclass(frozen=True)
class Estimate:
    """Predicted by the search's own sums: a step, the idle share, bytes at each position."""

    step_s: float
    bubble: float
    memory: tuple[Mapping[str, int], ...]
    host: tuple[int, ...] = ()  # kept on the host by each position,
    host_limit: int = 0  # and what each may

    @property
    def peak_bytes(self) -> int:
        return max(sum(entries.values()) for entries in self.memory)

    @property
    def fits_host(self) -> bool:
        return max(self.host, default=0) <= self.host_limit


class _Times(NamedTuple):
    """Seconds of a stage's passes of one microbatch."""

    forward: float
    backward: float
    weight: float
    last: float  # the last backward, to the end of its computing
    reduced: float  # the same, to the end of its reductions
    later: float  # the last W, to the end of reductions that begin in it, beyond its computing
    before: float  # the very first gather
    compute: float
    earlier: float  # of forward, in passes before the last


@dataclass
class Estimator:
    """Estimates candidates of one mesh and one microbatch size; `rows[k]` are the chain's items on
    positions of class k, `borders[j]` what crosses a cut before item j (bytes by tensor), also in
    the passes before the last of `num_passes`.
    """

    site: Site
    rows: Sequence[Rows]
    borders: Sequence[Sequence[int]]
    num_passes: int = 1
    _units_seen: dict[object, tuple[Unit, ...]] = field(default_factory=dict, repr=False)
    _unit_seen: dict[object, Unit] = field(default_factory=dict, repr=False)
    _times_seen: dict[object, _Times] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.prefetch = self.site.cluster.device(0).kind != "cpu"
        self.kind_of = {name: index for index, name in enumerate(self.site.kinds)}

    def estimate(
        self,
        stretches: Sequence[Stretch],
        positions: Sequence[int],
        *,
        family: str,
        microbatches: int,
        zero: How,
        offload: Offload = "none",
    ) -> Estimate:
        """Return the estimate of stages `stretches`, stage s at `positions[s]`."""
        num = self.site.mesh.pipeline
        times = [
            self._times(stretch, position, zero, offload, first=s == 0)
            for s, (stretch, position) in enumerate(zip(stretches, positions, strict=True))
        ]
        spans = [self._span(one, family) for one in times]
        delays = [
            self._sends_s(stretches[s + 1].begin, positions[s], positions[s + 1])
            for s in range(len(stretches) - 1)
        ]
        if family == schedules.RECYCLED:
            early, again = self.num_passes - 1, self._wraps_s(stretches, positions)
            spans = [*[Span(one.earlier / early, 0.0, 0.0) for one in times] * early, *spans]
            delays = [*[*delays, again] * early, *delays]
        timing = schedules.timed(family, microbatches, spans, delays, num)
        # The table counts devices by the family's own placement.
        places = schedules.placement(family, num) if num > 1 else (0,) * len(stretches)
        end_s = {positions[s]: timing.ends_s[place] for s, place in enumerate(places)}
        sums = self._shared(stretches, positions)
        step_s = 0.0
        memory: list[Mapping[str, int]] = [{}] * num
        host = [0] * num
        busy = 0.0
        moments = schedules.alive(family, num, microbatches)
        for place, position in {places[s]: positions[s] for s in range(len(places))}.items():
            mine = [s for s in range(len(places)) if places[s] == place]
            halves = schedules.splits_backward(family)
            tail = max(
                times[s].later if halves else times[s].reduced - times[s].backward for s in mine
            )
            held = [u for s in mine for u in self._units(stretches[s], position, zero, offload)]
            done = end_s[position] + max(0.0, tail) + times[0].before
            for name, holders in sums.items():
                if position in holders:
                    size = self._tied_bytes(name)
                    last = max(end_s[holder] for holder in holders)
                    done = max(done, last + self.site.sum_s(size, holders))
            if not self._lands(zero):
                done += sum(u.down_s for u in held)
            updated = sum(u.updated for u in held)
            update_s = self.site.update_s(updated, position, offload)
            step_s = max(step_s, done + update_s + units.after_s(held))
            busy += microbatches * sum(times[s].compute for s in mine)
            memory[position] = self._memory(
                [stretches[s] for s in mine], position, held, moments[place], microbatches, mine,
                positions, offload,
            )  # fmt: skip
            host[position] = sum(u.host for u in held) + (1 + _MOMENTS) * updated
        bubble = max(0.0, 1 - busy / (num * timing.length_s))
        if offload == "none" or not self.prefetch:
            return Estimate(step_s, bubble, tuple(memory))
        limit = min(self.site.costs.host_bytes(position) for position in range(num))
        return Estimate(step_s, bubble, tuple(memory), tuple(host), limit)

    # Time -----------------------------------------------------------------------------------

    def _span(self, times: _Times, family: str) -> Span:
        if family == schedules.RECYCLED:
            return Span(times.forward - times.earlier, times.backward, 0.0)
        if not schedules.splits_backward(family):
            return Span(times.forward, times.backward, 0.0)
        return Span(times.forward, times.backward - times.weight, times.weight)

    def _sends_s(self, item: int, sender: int, receiver: int) -> float:
        return sum(self.site.send_s(size, sender, receiver) for size in self.borders[item])

    def _wraps_s(self, stretches: Sequence[Stretch], positions: Sequence[int]) -> float:
        """From the end of a pass to the beginning of the next: taken as what enters a block."""
        return self._sends_s(stretches[-1].begin, positions[-1], positions[0])

    def _times(
        self, stretch: Stretch, position: int, zero: How, offload: Offload, *, first: bool
    ) -> _Times:
        kind = self.kind_of[self.site.classes[position]]
        key = (stretch, kind, zero, offload, first)
        if key not in self._times_seen:
            held = self._units(stretch, position, zero, offload)
            self._times_seen[key] = self._timed(stretch, held, zero, self.rows[kind], first)
        return self._times_seen[key]

    def _lands(self, zero: How) -> bool:
        """Whether gradients go down to the host beside the backward (as predict.units)."""
        mesh = self.site.mesh
        if not (self.prefetch and mesh.data > 1 == mesh.pipeline):
            return False
        return zero in ("replicate", "shard") or (zero == "shard_optimizer" and mesh.replica == 1)

    def _timed(
        self, stretch: Stretch, held: Sequence[Unit], zero: How, rows: Rows, first: bool
    ) -> _Times:
        begin, end, again = stretch
        items = range(begin, end)
        forward = rows.forward[begin:end].tolist()
        backward = [
            float(rows.backward[i] + (rows.again[i] if i < again and rows.gain[i] > 0 else 0.0))
            for i in items
        ]
        weights = rows.weight[begin:end].tolist()
        sync = rows.sync[begin:end]
        gathers, back_gathers = [0.0] * len(forward), [0.0] * len(forward)
        reduces = [float(s) for s in sync]
        each, downs, fetches = ([0.0] * len(forward) for _ in range(3))
        meets, met_s = self.site.meets(zero), 0.0
        for unit in held:
            gathers[unit.item - begin] += self.num_passes * unit.gather_s
            if not unit.is_root:
                back_gathers[unit.item - begin] += unit.gather_s
            if meets:  # after the last backward
                met_s += unit.reduce_s
            else:
                reduces[unit.item - begin] += unit.reduce_s
            downs[unit.item - begin] += unit.drop_s + unit.down_s * self._lands(zero)
            fetches[unit.item - begin] += unit.fetch_s
            if zero == "shard_gradients":
                each[unit.item - begin] += unit.reduce_s
        nothing = [0.0] * len(forward)
        forward_s, _ = self._follow(forward, gathers, nothing, fetches)
        before_s = 0.0
        if first and self.prefetch:
            # Nothing holds up a step's first gathers but those before: they hide, save once.
            before_s = gathers[0] + fetches[0]
            forward_s -= before_s
        back = backward[::-1], back_gathers[::-1]
        middle_s, _ = self._follow(*back, each[::-1], fetches[::-1])
        last_s, reduced_s = self._follow(*back, reduces[::-1], fetches[::-1], downs[::-1])
        _, later_s = self._follow(weights[::-1], nothing, reduces[::-1])
        return _Times(
            forward_s,
            max(middle_s, sum(each)),
            sum(weights),
            last_s,
            max(last_s, reduced_s) + met_s,
            max(0.0, later_s - sum(weights)) + met_s,
            before_s,
            sum(forward) + sum(backward),
            float(rows.earlier[begin:end].sum()),
        )

    def _follow(
        self,
        compute: list[float],
        gathers: list[float],
        reduces: list[float],
        fetches: Sequence[float] = (),
        downs: Sequence[float] = (),
    ) -> tuple[float, float]:
        """Pieces one after another; a piece's copy from the host and gather run while the last one
        computes, its reduction after it, then its copy to the host. Returns when computing ends,
        and when the network and the copies are done.
        """
        if not any(gathers) and not any(reduces):
            return sum(compute), 0.0
        ends = [0.0]
        network = fetched = copied = 0.0
        none = [0.0] * len(compute)
        rows = zip(compute, gathers, reduces, fetches or none, downs or none, strict=True)
        for seconds, gather, reduce, fetch, down in rows:
            start = ends[-1]
            if gather:
                ahead = ends[-2] if self.prefetch and len(ends) > 1 else start
                fetched = max(fetched, ahead) + fetch
                network = max(network, fetched) + gather
                start = max(start, network)
            end = start + seconds
            if reduce:
                network = max(network, end) + reduce
                if gather and not self.prefetch:
                    end = network
                copied = max(copied, network) + down
            ends.append(end)
        return ends[-1], max(network, copied)

    # Parameters -----------------------------------------------------------------------------

    def _units(
        self, stretch: Stretch, position: int, zero: How, offload: Offload
    ) -> tuple[Unit, ...]:
        """Parameters that are gathered and reduced together: each block's, and all others."""
        kind = self.kind_of[self.site.classes[position]]
        key = (stretch.begin, stretch.end, kind, zero, offload)
        if key not in self._units_seen:
            rows = self.rows[kind]
            items = range(stretch.begin, stretch.end)
            groups = [(i, False, rows.parts[i]) for i in items if rows.is_block[i]]
            root = {
                part.name: part for i in items if not rows.is_block[i] for part in rows.parts[i]
            }
            groups.append((stretch.begin, True, tuple(root.values())))
            found = []
            for item, is_root, parts in groups:
                # Copies of a block hold the same tuple of parameters.
                own = ("root", stretch.begin, stretch.end) if is_root else id(parts)
                known = (own, kind, zero, offload)
                if parts and known not in self._unit_seen:
                    one = units.on_device(self.site, item, is_root, parts, position, zero)
                    self._unit_seen[known] = units.on_host(one, self.site, position, offload)
                if parts:
                    found.append(self._unit_seen[known]._replace(item=item))
            self._units_seen[key] = tuple(found)
        return self._units_seen[key]

    def _shared(
        self, stretches: Sequence[Stretch], positions: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        """Tied parameters that several positions hold."""
        holders: dict[str, set[int]] = {}
        for stretch, position in zip(stretches, positions, strict=True):
            for names in self.rows[0].tied[stretch.begin : stretch.end]:
                for name in names:
                    holders.setdefault(name, set()).add(position)
        return {name: tuple(sorted(held)) for name, held in holders.items() if len(held) > 1}

    def _tied_bytes(self, name: str) -> int:
        return max(names[name] for names in self.rows[0].tied if name in names)

    # Memory ---------------------------------------------------------------------------------

    def _memory(
        self,
        stretches: list[Stretch],
        position: int,
        units: list[Unit],
        alive: schedules.Alive,
        microbatches: int,
        stages: list[int],
        positions: Sequence[int],
        offload: Offload,
    ) -> Mapping[str, int]:
        rows = self.rows[self.kind_of[self.site.classes[position]]]
        # Torch's runtime has a buffer for every message of a step, the own executor none.
        buffered = self.num_passes == 1
        kept = [
            self._kept(rows, stretch, own=s == 0 or not buffered)
            for s, stretch in zip(stages, stretches, strict=True)
        ]
        kept += [float(rows.owed[one.begin : one.end].sum()) for one in stretches]
        passing = [*(self._passing(rows, stretch) for stretch in stretches), 0.0]
        gathered = self._gathered(units)
        reserved = sum(u.reserved for u in units)
        full = reserved or sum(u.gradients for u in units)
        if any(u.whole for u in units) and microbatches == 1:
            full = sum(u.share for u in units)
        # ZeRO-2's whole gradients of a unit, until they are reduced.
        whole = 0
        if any(u.reserved == u.share for u in units):
            whole = max(u.gradients for u in units)
        moments = []
        for moment in alive.held:
            activations = sum(n * k for n, k in zip(moment.counts, kept, strict=True))
            gradients = full if moment.begun else reserved
            running = whole if moment.running >= 0 else 0
            moments.append((activations, gradients + running, passing[moment.running]))
        activations, gradients, temporary = max(moments, key=sum)
        received = 0
        for s, stretch in zip(stages, stretches, strict=True) if buffered else ():
            if s > 0 and positions[s - 1] != position:
                received += microbatches * sum(self.borders[stretch.begin])
            if s + 1 < len(positions) and positions[s + 1] != position:
                received += microbatches * sum(self.borders[stretch.end])
        apart = offload != "none" and self.prefetch
        # Where the device is the host, the copies for the update lie beside what they are of.
        copied = sum(u.host for u in units) if offload == "optimizer" and not apart else 0
        sizes = {
            "parameters": sum(u.held for u in units) + copied,
            "gradients": gradients,
            "optimizer": 0 if apart else _MOMENTS * sum(u.updated for u in units),
            "activations": activations,
            "temporary": temporary,
            "communication": received + gathered + copied,
        }
        return {name: int(sizes[name]) for name in CATEGORIES}

    def _kept(self, rows: Rows, stretch: Stretch, *, own: bool) -> float:
        """What a microbatch keeps from forward to backward; what a stage receives is counted
        among the messages, unless it is its `own`.
        """
        found = float(_saved(rows, stretch).sum())
        return found if own else max(0.0, found - float(rows.entering[stretch.begin]))

    def _passing(self, rows: Rows, stretch: Stretch) -> float:
        """What the fullest operator takes beyond what a microbatch keeps. A recomputed block's
        saved tensors come back; what later items kept is free by then.
        """
        kept = _saved(rows, stretch)
        items = slice(stretch.begin, stretch.end)
        freed = kept.sum() - np.cumsum(kept)
        found = rows.temporary[items] + (rows.saved[items] - kept) - freed
        return max(0.0, float(found.max()))

    def _gathered(self, units: list[Unit]) -> int:
        """Whole parameters of the root and of two blocks: one computes, the next is gathered."""
        blocks = sorted(u.whole for u in units if not u.is_root)
        root = sum(u.whole for u in units if u.is_root)
        return root + sum(blocks[-2 if self.prefetch else -1 :])


def _saved(rows: Rows, stretch: Stretch) -> Any:
    """What each item keeps, those that are recomputed only what enters them."""
    found = rows.saved[stretch.begin : stretch.end].copy()
    width = stretch.again - stretch.begin
    found[:width] -= rows.gain[stretch.begin : stretch.again]
    return found
