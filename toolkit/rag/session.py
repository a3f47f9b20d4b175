"""One question on its way to an answer: rounds of generation and search, each one timed.

Pipelines are written against a Session, so that what happens around a round (today: a span on the
timeline; with lookahead: prefetching while text is generated) is in one place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from toolkit.rag.generator import Generator, Message
from toolkit.rag.retriever import Hit, Retriever
from toolkit.timeline import Span, Timeline

Clock = Callable[[], float]


class Session:
    """A retriever and a generator, with the k, nprobe and clock of one question."""

    def __init__(
        self,
        retriever: Retriever,
        generator: Generator,
        *,
        k: int = 4,
        nprobe: int | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Start the question's clock at 0."""
        self.retriever = retriever
        self.generator = generator
        self.k = k
        self.nprobe = retriever.probes(nprobe)
        self._clock = clock
        self._start_s = clock()
        self._spans: list[Span] = []

    def search(self, query: str, documents: Sequence[str] = ()) -> list[Hit]:
        """Return the best passages for a query (or its mean with hypothetical documents)."""
        start_s = self._now()
        vector = self.retriever.vector(query, documents)
        embedded_s = self._now()
        hits = self.retriever.retrieve(vector, self.k, self.nprobe)
        self._add("embed query", "encoder", start_s, embedded_s, "embed", query=query)
        self._add(
            "search", "index", embedded_s, self._now(), "scan",
            nprobe=self.nprobe, num_hits=len(hits),
        )  # fmt: skip
        return hits

    def generate(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        name: str = "generate",
        on_text: Callable[[str], None] | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> str:
        """Return the reply; `on_text` sees each piece as it arrives.

        The generator is told to stop as soon as `enough()` is true.
        """
        start_s = self._now()
        first_s: float | None = None
        pieces: list[str] = []
        reply = self.generator.stream(messages, max_tokens=max_tokens)
        try:
            for piece in reply:
                if first_s is None:
                    first_s = self._now()
                pieces.append(piece)
                if on_text:
                    on_text(piece)
                if enough():
                    break
        finally:
            # Closing is what aborts the request behind a stream that is left early.
            close = getattr(reply, "close", None)
            if close:
                close()
        end_s = self._now()
        first_s = end_s if first_s is None else first_s
        self._add(
            name, "generator", start_s, end_s, "generate",
            ttft_s=first_s - start_s, num_pieces=len(pieces),
        )  # fmt: skip
        return "".join(pieces)

    def timeline(self, title: str) -> Timeline:
        """Return what has been measured so far."""
        return Timeline(title, tuple(self._spans))

    def elapsed_s(self) -> float:
        """Return the seconds since the question was asked."""
        return self._now()

    def _now(self) -> float:
        return self._clock() - self._start_s

    def _add(
        self, name: str, track: str, start_s: float, end_s: float, group: str, **detail: Any
    ) -> None:
        self._spans.append(Span(name, track, start_s, end_s, "measured", group, detail))
