"""Drives an engine on virtual time: requests join when they arrive, steps follow one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from toolkit.serve.bench.load import Arrival
from toolkit.serve.bench.sample import Sample
from toolkit.serve.clock import VirtualClock
from toolkit.serve.engine import Engine
from toolkit.serve.request import Request, SamplingParams
from toolkit.serve.simulate.leap import Leaping


def drive(
    engine: Engine,
    clock: VirtualClock,
    arrivals: Sequence[Arrival],
    *,
    on_done: Callable[[], None] = lambda: None,
    stepwise: bool = False,
) -> list[Sample]:
    """Serve `arrivals`, which are in order of time, to the last token; return what clients saw.

    `clock` is the engine's. A request joins at the first step that begins after its arrival, as it
    does live; every token reaches its client when its step ends. `on_done` is called per request.
    An engine that can takes many steps of decoding at once; `stepwise` forbids it, for the same
    samples in more time, and a timeline of every step.
    """
    pieces: list[list[float]] = [[] for _ in arrivals]
    index: dict[str, int] = {}
    coming = 0

    def next_s(request: Request | None = None, now: float = 0.0) -> float:
        if request is not None:
            on_done()
        return arrivals[coming].at_s if coming < len(arrivals) else math.inf

    def join(now: float) -> float:
        nonlocal coming
        while coming < len(arrivals) and arrivals[coming].at_s <= now:
            made = _request(coming, arrivals[coming])
            index[made.id] = coming
            engine.add(made)
            coming += 1
        return next_s()

    leaping = engine if isinstance(engine, Leaping) and not stepwise else None
    while coming < len(arrivals) or engine.has_work:
        if not engine.has_work:
            clock.advance(max(0.0, arrivals[coming].at_s - clock.now()))
        upcoming_s = join(clock.now())
        if not engine.has_work:
            continue
        if leaping is not None:
            leap = leaping.leap(upcoming_s, next_s, join)
            if leap is not None:
                for request, _, num in leap.drawn:
                    pieces[index[request.id]] += leap.ends_s[:num]
                continue
        report = engine.step()
        for output in report.outputs:
            pieces[index[output.request.id]].append(report.end_s)
            if output.finish_reason is not None:
                on_done()
    return [_sample(arrival, seen) for arrival, seen in zip(arrivals, pieces, strict=True)]


def _request(number: int, arrival: Arrival) -> Request:
    length = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
    # A range holds any prompt in no memory; what the tokens are matters to nobody.
    return Request(f"r{number}", range(arrival.prompt_tokens), length, arrival_s=arrival.at_s)


def _sample(arrival: Arrival, seen: Sequence[float]) -> Sample:
    return Sample(
        arrival,
        sent_s=arrival.at_s,
        end_s=seen[-1],
        piece_s=tuple(seen),
        prompt_tokens=arrival.prompt_tokens,
        output_tokens=len(seen),
    )
