"""A small discrete-event simulation: tasks on the compute and network streams of ranks.

Each stream runs its tasks in the order given, one at a time; a task starts when its stream is
free and everything it needs has ended. Ranks that do the same are simulated once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from toolkit.plan.order.action import Action
from toolkit.plan.order.pipeline import needs
from toolkit.timeline import Span, Timeline

Stream = Literal["compute", "network"]


@dataclass(frozen=True)
class Task:
    """Something that occupies one stream of one rank for `seconds`."""

    name: str
    rank: int
    stream: Stream
    seconds: float
    group: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A simulated step: each task with its start and end."""

    tasks: tuple[tuple[Task, float, float], ...]

    @property
    def step_s(self) -> float:
        return max((end_s for _, _, end_s in self.tasks), default=0.0)

    @property
    def bubble(self) -> float:
        """The idle share of the schedule: 1 - compute of the mean rank / its length.

        The schedule ends when the last gradient is there; the optimizer is outside it.
        """
        inside = [entry for entry in self.tasks if entry[0].group != "optimizer"]
        ranks = {task.rank for task, _, _ in inside}
        length_s = max((end_s for _, _, end_s in inside), default=0.0)
        busy_s = sum(task.seconds for task, _, _ in inside if task.stream == "compute")
        return 1 - busy_s / (len(ranks) * length_s) if length_s else 0.0

    def timeline(self, title: str) -> Timeline:
        """Return the step as predicted spans; communication lies on tracks of its own."""
        return Timeline(
            title,
            tuple(
                Span(
                    task.name,
                    f"rank {task.rank}" + ("" if task.stream == "compute" else " network"),
                    start_s,
                    end_s,
                    "predicted",
                    task.group,
                )
                for task, start_s, end_s in self.tasks
                if end_s > start_s
            ),
        )


def run(tasks: Iterable[Task]) -> Run:
    """Simulate; raises ValueError naming the tasks that wait for one another for ever."""
    queues: dict[tuple[int, Stream], deque[Task]] = {}
    for task in tasks:
        queues.setdefault((task.rank, task.stream), deque()).append(task)
    free_at = dict.fromkeys(queues, 0.0)
    ended: dict[str, float] = {}
    done: list[tuple[Task, float, float]] = []
    progress = True
    while progress:
        progress = False
        for stream, queue in queues.items():
            while queue and all(name in ended for name in queue[0].needs):
                task = queue.popleft()
                start_s = max([free_at[stream], *(ended[name] for name in task.needs)])
                ended[task.name] = free_at[stream] = start_s + task.seconds
                done.append((task, start_s, ended[task.name]))
                progress = True
    stuck = [queue[0].name for queue in queues.values() if queue]
    if stuck:
        raise ValueError(f"tasks wait for ever: {', '.join(stuck)}")
    return Run(tuple(done))


def pipeline(
    order: Sequence[Sequence[Action]],
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_forward_s: Sequence[float],
    send_backward_s: Sequence[float],
) -> list[Task]:
    """Return the tasks of an order table whose stages take these seconds a microbatch.

    `send_forward_s[s]` is what stage s needs to send its activations on, `send_backward_s[s]` to
    send its input's gradient back; 0 where there is nothing to send.
    """
    last = len(order) - 1
    present = dict.fromkeys(action for row in order for action in row)
    tasks = []
    for stage, row in enumerate(order):
        for action in row:
            forward = action.kind == "F"
            sources = []
            for source in needs(action, len(order), frozenset(), present):
                sources.append(str(source) if source.stage == stage else f"send {source}")
            seconds = (forward_s if forward else backward_s)[stage]
            group = "forward" if forward else "backward"
            tasks.append(Task(str(action), stage, "compute", seconds, group, tuple(sources)))
            if stage < last if forward else stage > 0:
                send_s = (send_forward_s if forward else send_backward_s)[stage]
                tasks.append(
                    Task(f"send {action}", stage, "network", send_s, "send", (str(action),))
                )
    return tasks
