"""A small discrete-event simulation: tasks on the streams of ranks.

Each stream runs its tasks in the order given, one at a time; a task starts when its stream is
free and everything it needs has ended. Ranks that do the same are simulated once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

from toolkit.plan.predict.costs import Stream
from toolkit.timeline import Counter, Span, Timeline

# Tracks of a timeline, beside that of a rank's computing.
_TRACKS = {"compute": "", "down": " to host", "up": " from host", "host": " host"}


@dataclass(frozen=True, slots=True)
class Task:
    """Something that occupies one stream of one rank for `seconds`.

    `waiting_s` of them are spent waiting for communication inside it.
    """

    key: Hashable
    rank: int
    stream: Stream
    seconds: float
    group: str
    needs: tuple[Hashable, ...] = ()
    label: str = ""
    waiting_s: float = 0.0

    @property
    def name(self) -> str:
        return self.label or str(self.key)


@dataclass(frozen=True)
class Run:
    """A simulated step: each task with its start and end, and what each rank holds over time."""

    tasks: tuple[tuple[Task, float, float], ...]
    memory: tuple[Counter, ...] = ()

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
        busy_s = sum(
            task.seconds - task.waiting_s for task, _, _ in inside if task.stream == "compute"
        )
        return 1 - busy_s / (len(ranks) * length_s) if length_s else 0.0

    @property
    def ends(self) -> dict[Hashable, float]:
        """When each task ends."""
        return {task.key: end_s for task, _, end_s in self.tasks}

    def with_memory(self, memory: Iterable[Counter]) -> Run:
        return replace(self, memory=tuple(memory))

    def timeline(self, title: str) -> Timeline:
        """Return the step as predicted spans; communication lies on tracks of its own."""
        return Timeline(
            title,
            tuple(
                Span(
                    task.name,
                    f"rank {task.rank}{_TRACKS.get(task.stream, ' network')}",
                    start_s,
                    end_s,
                    "predicted",
                    task.group,
                )
                for task, start_s, end_s in self.tasks
                if end_s > start_s
            ),
            self.memory,
        )


def run(tasks: Iterable[Task]) -> Run:
    """Simulate; raises ValueError naming the tasks that wait for one another for ever."""
    queues: dict[tuple[int, Stream], deque[Task]] = {}
    for task in tasks:
        queues.setdefault((task.rank, task.stream), deque()).append(task)
    free_at = dict.fromkeys(queues, 0.0)
    ended: dict[Hashable, float] = {}
    done: list[tuple[Task, float, float]] = []
    waiting: dict[Hashable, list[tuple[int, Stream]]] = {}  # task -> streams whose next needs it
    ready = deque(queues)
    while ready:
        stream = ready.popleft()
        queue = queues[stream]
        while queue:
            task = queue[0]
            missing = next((key for key in task.needs if key not in ended), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(stream)
                break
            queue.popleft()
            start_s = max(free_at[stream], max((ended[key] for key in task.needs), default=0.0))
            ended[task.key] = free_at[stream] = start_s + task.seconds
            done.append((task, start_s, ended[task.key]))
            ready.extend(waiting.pop(task.key, ()))
    stuck = [queue[0].name for queue in queues.values() if queue]
    if stuck:
        raise ValueError(f"tasks wait for ever: {', '.join(stuck)}")
    return Run(tuple(done))
