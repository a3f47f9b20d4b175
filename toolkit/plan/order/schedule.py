"""A schedule: when each block starts; what it leaves idle, holds and takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from toolkit.errors import FormatError
from toolkit.plan.order.action import Action, Rows
from toolkit.plan.order.problem import Problem, names
from toolkit.timeline import Span, Timeline

# Two times closer than this share of the makespan are the same: sums of floats differ.
_TOLERANCE = 1e-9
_GROUPS = {"F": "forward", "B": "backward", "I": "backward", "W": "weight gradient"}


@dataclass(frozen=True)
class Schedule:
    """`starts[i]` is when block i of the problem starts. `check()` says whether that is right."""

    problem: Problem
    starts: tuple[float, ...]

    @cached_property
    def ends(self) -> tuple[float, ...]:
        """When each block ends."""
        spans = (block.span for block in self.problem.blocks)
        return tuple(start + span for start, span in zip(self.starts, spans, strict=True))

    @property
    def makespan(self) -> float:
        """From time 0 to the end of the last block."""
        return max(self.ends, default=0.0)

    @cached_property
    def rows(self) -> Rows:
        """The table: the actions of each device by start; what the devices run is only this."""
        blocks = self.problem.blocks
        return tuple(
            tuple(
                blocks[i].action for i in sorted(row, key=lambda i: (self.starts[i], self.ends[i]))
            )
            for row in self.problem.on_device
        )

    def idle(self, device: int) -> float:
        """The time of the makespan in which `device` runs nothing."""
        return self.makespan - self.problem.busy(device)

    def stall(self, device: int) -> float:
        """The idle time between the first start and the last end on `device`.

        Zero-bubble schedules are judged by this: a device need not wait for the others to begin
        the next step (Qi et al., arXiv 2401.10241, section 4).
        """
        row = self.problem.on_device[device]
        if not row:
            return 0.0
        length = max(self.ends[i] for i in row) - min(self.starts[i] for i in row)
        return length - self.problem.busy(device)

    @property
    def bubble(self) -> float:
        """The idle share of the mean device."""
        whole = self.makespan * self.problem.num_devices
        busy = sum(map(self.problem.busy, range(self.problem.num_devices)))
        return 1 - busy / whole if whole else 0.0

    def memory(self, device: int) -> tuple[tuple[float, float], ...]:
        """(time, held from then on) on `device`; what ends at a time is freed before what starts
        then is held.
        """
        events = []
        for i in self.problem.on_device[device]:
            delta = self.problem.blocks[i].memory
            if delta:
                events.append((self.starts[i] if delta > 0 else self.ends[i], delta))
        close = self.makespan * _TOLERANCE
        events.sort()
        levels: list[tuple[float, float]] = []
        held, at = 0.0, 0
        while at < len(events):
            time, until = events[at][0], at
            while until < len(events) and events[until][0] <= time + close:
                held += events[until][1]
                until += 1
            levels.append((time, held))
            at = until
        return tuple(levels)

    def peak_memory(self, device: int) -> float:
        """The most that `device` ever holds."""
        return max((held for _, held in self.memory(device)), default=0.0)

    @property
    def peak(self) -> float:
        """The most that any device ever holds."""
        return max(map(self.peak_memory, range(self.problem.num_devices)), default=0.0)

    def violations(self) -> Iterator[str]:
        """Yield what is wrong, block by block: order, devices shared, memory."""
        problem, blocks = self.problem, self.problem.blocks
        if len(self.starts) != len(blocks):
            yield f"{len(self.starts)} starts for {len(blocks)} blocks"
            return
        for block, start in zip(blocks, self.starts, strict=True):
            if not math.isfinite(start):
                yield f"{block} starts at {start}"
                return
        close = max(1.0, self.makespan) * _TOLERANCE
        for i, sources in enumerate(problem.sources):
            if self.starts[i] < -close:
                yield f"{blocks[i]} starts at {self.starts[i]:g}, before time 0"
            for source, delay in sources:
                ready = self.ends[source] + delay
                if self.starts[i] < ready - close:
                    yield (
                        f"{blocks[i]} starts at {self.starts[i]:g}; {blocks[source]}, which it "
                        f"needs, is there at {ready:g}"
                    )
        for device, row in enumerate(problem.on_device):
            by_start = sorted(row, key=lambda i: (self.starts[i], self.ends[i]))
            for first, second in pairwise(by_start):
                if self.starts[second] < self.ends[first] - close:
                    yield (
                        f"{blocks[first]} and {blocks[second]} are on device {device} at once "
                        f"(until {self.ends[first]:g}, from {self.starts[second]:g})"
                    )
            for time, held in self.memory(device):
                if held > problem.memory_limit * (1 + _TOLERANCE):
                    running = [blocks[i] for i in row if self.starts[i] <= time + close]
                    yield (
                        f"device {device} holds {held:g} of {problem.memory_limit:g} from "
                        f"{time:g} on, with {max(running, key=lambda b: self.start(b.action))}"
                    )
                    break

    def start(self, action: Action) -> float:
        """Return when the block of `action` starts; KeyError when there is none."""
        return self.starts[self.problem.index[action]]

    def check(self) -> None:
        """Raise FormatError naming the blocks unless the schedule keeps every rule."""
        wrong = list(self.violations())
        if wrong:
            raise FormatError(f"the schedule cannot be run: {names(wrong, most=3)}")

    def timeline(self, title: str, *, unit_s: float = 1.0) -> Timeline:
        """Return the schedule as simulated spans, a unit of time taking `unit_s` seconds."""
        return Timeline(
            title,
            tuple(
                Span(
                    str(block),
                    f"device {device}",
                    self.starts[i] * unit_s,
                    self.ends[i] * unit_s,
                    "simulated",
                    "shared" if len(block.devices) > 1 else _GROUPS.get(block.action.kind, ""),
                )
                for device in range(self.problem.num_devices)
                for i in self.problem.on_device[device]
                for block in [self.problem.blocks[i]]
            ),
        )
