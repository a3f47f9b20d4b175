"""What a simulation of programs found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from toolkit.serve.bench.report import spread
from toolkit.serve.clock import VirtualClock
from toolkit.serve.policy import LeastAttainedService, QueueConfig
from toolkit.serve.request import Request
from toolkit.serve.simulate.agents import AgentProgram
from toolkit.serve.simulate.drive_programs import Finished, ProgramDriver
from toolkit.serve.simulate.program_systems import ProgramSystem
from toolkit.serve.simulate.systems import Setup


def simulate(
    system: ProgramSystem,
    setup: Setup,
    made: Iterable[AgentProgram],
    *,
    queues: QueueConfig | None = None,
    on_done: Callable[[], None] = lambda: None,
    stepwise: bool = False,
) -> tuple[dict[str, Any], list[Finished]]:
    """Serve programs on virtual time; return the run's figures (simulated) and every program's.

    `on_done` is called per program; `stepwise` takes no steps together, to the same end.
    """
    clock, done = VirtualClock(), list[Finished]()
    # The policy asks the driver, which drives the engine, which holds the policy.
    drivers: list[ProgramDriver] = []

    def remaining(call: Request) -> float:
        return drivers[0].remaining(call)

    engine = system.build(setup, clock, remaining, queues or QueueConfig())

    def over(one: Finished) -> None:
        done.append(one)
        on_done()

    drivers.append(ProgramDriver(engine, clock, made, on_done=over))
    drivers[0].run(stepwise=stepwise)
    scheduler = engine.scheduler
    policy = scheduler.prefill_policy
    found = figures(done) | {
        "source": "simulated",
        "num_calls": drivers[0].num_calls,
        "num_tokens": drivers[0].num_tokens,
        "most_open": drivers[0].most_open,
        "num_preemptions": scheduler.num_preemptions,
        "num_promotions": policy.num_promotions if isinstance(policy, LeastAttainedService) else 0,
        "prefix_hit": scheduler.tables.num_hit / max(1, scheduler.tables.num_queried),
    }
    return found, done


def figures(done: Sequence[Finished]) -> dict[str, Any]:
    """Return the figures of programs that are over, of all and by kind."""
    kinds: dict[str, list[Finished]] = defaultdict(list)
    for one in done:
        kinds[one.kind].append(one)
    duration_s = max(one.end_s for one in done) - min(one.at_s for one in done)
    busy_s = sum(one.waited_s + one.served_s for one in done)
    return {
        "num_programs": len(done),
        "duration_s": duration_s,
        "programs_per_s": len(done) / duration_s if duration_s else 0.0,
        "output_tokens_per_s": sum(one.num_tokens for one in done) / max(duration_s, 1e-9),
        "latency_s": spread([one.latency_s for one in done]),
        "per_token_s": spread([one.per_token_s for one in done]),
        "waiting_part": sum(one.waited_s for one in done) / busy_s if busy_s else 0.0,
        "kinds": {
            kind: {
                "num_programs": len(those),
                "latency_s": spread([one.latency_s for one in those]),
                "per_token_s": spread([one.per_token_s for one in those]),
            }
            for kind, those in sorted(kinds.items())
        },
    }


def sustained(runs: Iterable[tuple[float, float]], limit: float) -> float | None:
    """Return the highest rate at which a latency stays within `limit`, between rates in proportion.

    `runs` are (rate, latency), in order of rate; None where even the lowest is above the limit.

    >>> sustained([(1.0, 0.1), (2.0, 0.3)], 0.2)
    1.5
    """
    before: tuple[float, float] | None = None
    for rate, latency in _rising(runs):
        if latency > limit:
            if before is None:
                return None
            part = (limit - before[1]) / (latency - before[1])
            return before[0] + part * (rate - before[0])
        before = (rate, latency)
    return before[0] if before else None


def _rising(runs: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """A latency that fell with the load did so by chance: the highest before it counts."""
    most = 0.0
    for rate, latency in runs:
        most = max(most, latency)
        yield rate, most
