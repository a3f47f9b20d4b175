"""A schedule as text: a line a device, a span numbered by its microbatch."""

from __future__ import annotations

import io
from dataclasses import replace

from toolkit.plan.order.schedule import Schedule
from toolkit.timeline import Timeline, terminal

_PASSES = {
    "F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"
}  # fmt: skip


def timeline(schedule: Schedule, title: str) -> Timeline:
    """Return the timeline with microbatches as names and a group per pass and chunk of a device."""
    problem = schedule.problem
    chunks: list[list[int]] = []
    for row in problem.on_device:
        stages = {
            problem.blocks[i].action.stage for i in row if len(problem.blocks[i].devices) == 1
        }
        chunks.append(sorted(stages))
    whole = schedule.timeline(title)
    several = max(map(len, chunks), default=0) > 1
    spans = []
    places = (i for row in problem.on_device for i in row)
    for span, i in zip(whole.spans, places, strict=True):
        block = problem.blocks[i]
        group = _PASSES[block.action.kind]
        if len(block.devices) > 1:
            group = f"shared {group}"
        elif several:
            group += f", chunk {chunks[block.devices[0]].index(block.action.stage)}"
        spans.append(replace(span, name=str(block.action.microbatch), group=group))
    return replace(whole, spans=tuple(spans))


def text(schedule: Schedule, title: str, *, columns_a_unit: int = 2) -> str:
    """Return the schedule drawn without colour, `columns_a_unit` characters for each unit of time.

    >>> from toolkit.plan.order import clock, simple
    >>> print(text(clock.run(simple.one_f_one_b(2, 2)), "1F1B", columns_a_unit=3))
    1F1B
    device 0 simulated  0==1==      0~~~~~   1~~~~~
    device 1 simulated     0==0~~~~~1==1~~~~~
                        |0 s           |5 s
    == forward   ~~ backward
    simulated 9 s
    """
    from rich.console import Console

    drawn = timeline(schedule, title)
    labels = max(len(track) for track, _ in drawn.tracks) + len("simulated") + 3
    width = labels + round(schedule.makespan * columns_a_unit)
    file = io.StringIO()
    # The legend may be wider than the chart, and must not be folded.
    console = Console(file=file, width=max(width, 200), color_system=None)
    console.print(terminal.render(drawn, width, max_lines=64))
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())
