"""The systems that are compared on programs: the same engine, memory and kernels, another order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from toolkit.errors import unknown_name
from toolkit.serve.clock import VirtualClock
from toolkit.serve.journal import Journal
from toolkit.serve.kv.blocks import BlockPool
from toolkit.serve.policy import (
    FeedbackQueue,
    FirstComeFirstServed,
    Policy,
    ProgramLeastAttained,
    QueueConfig,
    ThreadedLeastAttained,
)
from toolkit.serve.policy.srpt import ShortestRemainingProgram
from toolkit.serve.request import Request
from toolkit.serve.scheduler import Scheduler, SchedulerConfig
from toolkit.serve.simulate.engines import UndividedEngine
from toolkit.serve.simulate.systems import Setup

Remaining = Callable[[Request], float]


@dataclass(frozen=True)
class ProgramSystem:
    """A name, what it is, whether it caches prefixes, and its policy."""

    name: str
    about: str
    prefix_cache: bool
    policy: Callable[[QueueConfig, Remaining], Policy]

    def build(
        self, setup: Setup, clock: VirtualClock, remaining: Remaining, queues: QueueConfig
    ) -> UndividedEngine:
        """Return its engine; `remaining` is what only a clairvoyant policy asks."""
        limits = SchedulerConfig(
            max_batch=setup.max_batch,
            step_tokens=setup.step_tokens,
            max_context=setup.max_context,
            prefix_cache=self.prefix_cache,
        )
        pool, policy = BlockPool(setup.num_blocks, setup.block_size), self.policy(queues, remaining)
        scheduler = Scheduler(limits, pool, policy, policy)
        # A journal of many calls is of no use; a short one costs nothing.
        journal = Journal(100, source="simulated")
        return UndividedEngine(scheduler, setup.executor(clock), clock, journal=journal)


PROGRAM_SYSTEMS: Mapping[str, ProgramSystem] = {
    made.name: made
    for made in (
        ProgramSystem(
            "fcfs", "first come first served, no prefix cache (like vLLM)", False,
            lambda queues, remaining: FirstComeFirstServed(),
        ),
        ProgramSystem(
            "fcfs-cached", "first come first served with prefix cache (like vLLM's best)", True,
            lambda queues, remaining: FirstComeFirstServed(),
        ),
        ProgramSystem(
            "mlfq", "feedback queues over calls, with prefix cache", True,
            lambda queues, remaining: FeedbackQueue(queues),
        ),
        ProgramSystem(
            "plas", "feedback queues by the program's sum of service", True,
            lambda queues, remaining: ProgramLeastAttained(queues),
        ),
        ProgramSystem(
            "atlas", "feedback queues by the program's longest chain", True,
            lambda queues, remaining: ThreadedLeastAttained(queues),
        ),
        ProgramSystem(
            "srpt", "shortest remaining program first: a clairvoyant bound", True,
            lambda queues, remaining: ShortestRemainingProgram(remaining),
        ),
    )
}  # fmt: skip


def find(name: str) -> ProgramSystem:
    """Return a system by name; an unknown one is an error that names the nearest."""
    if name not in PROGRAM_SYSTEMS:
        raise unknown_name("program system", name, PROGRAM_SYSTEMS)
    return PROGRAM_SYSTEMS[name]
