"""One question on its way to an answer: rounds of generation and search, each one timed.

Pipelines are written against a Session, so what happens around a round is in one place: a span on
the timeline, a line in the recording, and lookahead from each generation that leads to a search.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from toolkit.rag.filters import Condition
from toolkit.rag.foresight import Foresight, Mode, Towards
from toolkit.rag.fusion import fuse
from toolkit.rag.generator import Generator, Message
from toolkit.rag.lexical import Lexical
from toolkit.rag.prefetch import Ahead
from toolkit.rag.retriever import Hit, Retriever
from toolkit.rag.rounds import Generated
from toolkit.timeline import Span, Timeline

Clock = Callable[[], float]


@dataclass(frozen=True)
class Evidence:
    """What a pipeline found for a question, best first, and the answer if it wrote one itself."""

    hits: list[Hit]
    answer: str | None = None


class Session:
    """A retriever and a generator, with the settings, clock and record of one question.

    Use inside `with`, which drops a lookahead whose search never came.

    `rounds` are its generations, `aheads` what each lookahead was good for, `waits_s` how long each
    search took from the end of the text before it (embedding, missing reads and scan).
    """

    def __init__(
        self,
        retriever: Retriever,
        generator: Generator,
        *,
        k: int = 4,
        nprobe: int | None = None,
        lookahead: Mode = "progressive",
        multiple: float = 2.0,
        lexical: Lexical | None = None,
        where: Sequence[str] = (),
        clock: Clock = time.perf_counter,
    ) -> None:
        """Start the question's clock at 0.

        A lookahead brings in at most `multiple` times the bytes of `nprobe` lists. With `lexical`,
        each search is fused with one by words (BM25). `where` are conditions on passages
        (filters.py).
        """
        self.retriever = retriever
        self.generator = generator
        self.k = k
        self.nprobe = retriever.probes(nprobe)
        self.rounds: list[Generated] = []
        self.aheads: list[Ahead] = []
        self.waits_s: list[float] = []
        self._mode, self._multiple, self._lexical = lookahead, multiple, lexical
        self._among = retriever.among(where)
        self._conditions = [Condition.parse(each) for each in where]
        self._foresight: Foresight | None = None
        self._clock = clock
        self._start_s = clock()
        self._spans: list[Span] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_foresight()  # a generation need not have led to a search

    def search(self, query: str, documents: Sequence[str] = ()) -> list[Hit]:
        """Return the best passages for a query (or its mean with hypothetical documents)."""
        return self.search_many([(query, documents)])[0]

    def search_many(self, wanted: Sequence[tuple[str, Sequence[str]]]) -> list[list[Hit]]:
        """Return the best passages for each of several (query, documents), searched together."""
        start_s = self._now()
        vectors = [self.retriever.vector(query, documents) for query, documents in wanted]
        embedded_s = self._now()
        self._add(
            "embed query", "encoder", start_s, embedded_s, "embed",
            query="; ".join(query for query, _ in wanted),
        )  # fmt: skip
        before = self.retriever.tiers.traffic()
        ahead = self._settle(vectors)
        try:
            found, where = self.retriever.retrieve_many(
                vectors, self.k, self.nprobe, among=self._among
            )
        finally:
            self._close_foresight()
        after = self.retriever.tiers.traffic()
        detail = asdict(ahead) if ahead else {}
        self._add(
            "search", "index", embedded_s, self._now(), "scan",
            nprobe=self.nprobe, num_hits=sum(map(len, found)), missing_bytes=where.missing_bytes,
            resident_bytes=where.resident_bytes, read_bytes=after.read_bytes - before.read_bytes,
            **{f"lookahead_{name}": value for name, value in detail.items()},
        )  # fmt: skip
        if self._lexical:
            words_s = self._now()
            found = [
                fuse([hits, self._words(query)], self.k)
                for hits, (query, _) in zip(found, wanted, strict=True)
            ]
            self._add("search words", "index", words_s, self._now(), "words")
        self.waits_s.append(self._now() - start_s)
        return found

    def generate(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        name: str = "generate",
        towards: Towards | None = None,
        on_text: Callable[[str], None] | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> str:
        """Return the reply; `on_text` sees each piece as it arrives.

        `towards` says what the search after it would be with the text so far; while the text comes,
        the lists of that search are brought in. The generator is told to stop as soon as `enough()`
        is true.
        """
        start_s = self._now()
        first_s: float | None = None
        pieces: list[tuple[float, str]] = []
        self._close_foresight()
        if towards and self._mode != "off" and not self._all_resident():
            self._foresight = Foresight(
                self.retriever, towards, mode=self._mode, nprobe=self.nprobe,
                multiple=self._multiple, num_tokens=self.retriever.pace.expected(name, max_tokens),
            )  # fmt: skip
        try:
            reply = self.generator.stream(messages, max_tokens=max_tokens)
            try:
                for piece in reply:
                    now_s = self._now()
                    first_s = now_s if first_s is None else first_s
                    pieces.append((now_s - start_s, piece))
                    if self._foresight:
                        self._foresight.feed(len(pieces), "".join(text for _, text in pieces))
                    if on_text:
                        on_text(piece)
                    if enough():
                        break
            finally:
                # Closing is what aborts the request behind a stream that is left early.
                close = getattr(reply, "close", None)
                if close:
                    close()
        except BaseException:
            self._close_foresight()
            raise
        end_s = self._now()
        if self._foresight:
            self._foresight.ended(end_s - start_s)
        self.retriever.pace.said(name, len(pieces))
        first_s = end_s if first_s is None else first_s
        self._add(
            name, "generator", start_s, end_s, "generate",
            ttft_s=first_s - start_s, num_pieces=len(pieces),
        )  # fmt: skip
        asked = tuple(dict(message) for message in messages)
        self.rounds.append(Generated(name, asked, max_tokens, tuple(pieces), end_s - start_s))
        return "".join(text for _, text in pieces)

    def _words(self, query: str) -> list[Hit]:
        assert self._lexical
        # Filtered afterwards: deep enough for most filters, and fewer hits for the rarest.
        deep = self.k if not self._conditions else 50 * self.k
        hits = self._lexical.search(query, deep)
        kept = [hit for hit in hits if all(each.holds(hit.passage) for each in self._conditions)]
        return kept[: self.k]

    def _all_resident(self) -> bool:
        return self.retriever.tiers.arena.used_bytes >= self.retriever.store.num_bytes_held

    def _settle(self, vectors: Sequence[np.ndarray]) -> Ahead | None:
        if self._foresight is None:
            return None
        probes = [self.retriever.rank(vector, self.nprobe) for vector in vectors]
        ahead = self._foresight.settle(np.unique(np.concatenate(probes)))
        self.aheads.append(ahead)
        return ahead

    def _close_foresight(self) -> None:
        if self._foresight:
            self._foresight.close()
            self._foresight = None

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
