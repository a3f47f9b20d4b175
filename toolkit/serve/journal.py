"""What the engine did, kept in a ring: the last steps and requests as a measured timeline."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from toolkit.serve.batch import Batch
from toolkit.serve.request import Phase, Request
from toolkit.timeline import Counter, Source, Span, Timeline


@dataclass(frozen=True, slots=True)
class _Step:
    number: int
    start_s: float
    end_s: float
    loads: tuple[tuple[Phase, int, int], ...]
    num_waiting: int
    kv_usage: float


class Journal:
    """Records steps and finished requests, the newest `capacity` of each; cheap per step."""

    def __init__(self, capacity: int = 20_000, source: Source = "measured") -> None:
        self.source = source
        self._steps: deque[_Step] = deque(maxlen=capacity)
        self._lives: deque[tuple[Span, ...]] = deque(maxlen=max(1, capacity // 10))

    def step(
        self, batch: Batch, start_s: float, end_s: float, *, num_waiting: int, kv_usage: float
    ) -> None:
        """Note that `batch` ran from `start_s` to `end_s`, and what queue and cache held then."""
        counts: dict[Phase, list[int]] = {}
        for piece in batch.slices:
            count = counts.setdefault(piece.phase, [0, 0])
            count[0] += 1
            count[1] += piece.num_tokens
        loads = tuple((phase, number, tokens) for phase, (number, tokens) in counts.items())
        self._steps.append(_Step(batch.step, start_s, end_s, loads, num_waiting, kv_usage))

    def finished(self, request: Request) -> None:
        """Note a request that has ended: its spans are kept, its tokens are not."""
        self._lives.append(self._life(request))

    def timeline(self, title: str) -> Timeline:
        """Return tracks `prefill` and `decode` (steps), then one per request, and two counters.

        A mixed step computes both phases at once, so it is a span on both tracks. Safe to call
        from another thread than the engine's.
        """
        # Steps of a divided engine overlap, and come in the order of their ends.
        steps = sorted(self._steps.copy(), key=lambda step: step.start_s)
        spans: list[Span] = []
        for step in steps:
            for phase, num_requests, num_tokens in step.loads:
                detail = {"step": step.number, "requests": num_requests, "tokens": num_tokens}
                name = f"{num_tokens} tokens" if phase is Phase.PREFILL else f"batch {num_requests}"
                span = (name, phase.value, step.start_s, step.end_s, self.source, phase.value)
                spans.append(Span(*span, detail))
        spans.sort(key=lambda span: span.track != Phase.PREFILL.value)
        for life in self._lives.copy():
            spans += life
        counters = (
            Counter(
                "KV cache used",
                tuple((s.start_s, 100 * s.kv_usage) for s in steps),
                self.source,
                "%",
            ),
            Counter(
                "requests waiting", tuple((s.start_s, s.num_waiting) for s in steps), self.source
            ),
        )
        return Timeline(title, tuple(spans), counters if steps else ())

    def _life(self, request: Request) -> tuple[Span, ...]:
        """Queued, prefill, decode: as far as the request came before it ended."""
        marks = (request.arrival_s, request.scheduled_s, request.first_token_s)
        detail = {
            "id": request.id,
            "prompt_tokens": len(request.prompt_ids),
            "output_tokens": len(request.output_ids),
            "preemptions": request.num_preemptions,
            "finish_reason": request.finish_reason.value if request.finish_reason else None,
        }
        spans = []
        for index, group in enumerate(("queued", "prefill", "decode")):
            start_s = marks[index]
            if start_s is None:
                break
            later = [mark for mark in marks[index + 1 :] if mark is not None]
            end_s = later[0] if later else request.finished_s
            if end_s is not None and end_s > start_s:
                track = f"request {request.arrival_seq}"
                spans.append(Span(group, track, start_s, end_s, self.source, group, detail))
        return tuple(spans)
