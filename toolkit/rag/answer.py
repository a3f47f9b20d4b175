"""A question answered from the passages found, with citations that can be opened and checked."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from toolkit.rag import citations, pipelines, prompts
from toolkit.rag.citations import Citation
from toolkit.rag.foresight import Mode
from toolkit.rag.generator import Generator
from toolkit.rag.lexical import Lexical
from toolkit.rag.prefetch import Ahead
from toolkit.rag.prompts import NOT_FOUND
from toolkit.rag.retriever import Hit, Retriever
from toolkit.rag.rounds import Generated, Recording
from toolkit.rag.session import Clock, Session
from toolkit.rag.stream import MarkerFilter, RepeatFilter
from toolkit.timeline import Timeline

_NOT_FOUND = re.compile(r"\W*not found in the passages\b", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """What was said, what it rests on, and how long it took (measured).

    `text` is the model's, less citation numbers that no passage has, and ends where the model
    begins to repeat itself. `found` is False when no
    passage was close enough to ask a model about, or the model said so. `unsupported` holds the
    sentences that cite nothing and that no passage supports. `hits` are the passages the model was
    given: hit n-1 is passage [n]. `aheads` are the lookaheads of its rounds, `waits_s` the time of
    each search, from the text before it to its passages.
    """

    question: str
    text: str
    found: bool
    citations: tuple[Citation, ...]
    unsupported: tuple[str, ...]
    hits: tuple[Hit, ...]
    timings: Mapping[str, float]
    timeline: Timeline
    pipeline: str = "plain"
    rounds: tuple[Generated, ...] = ()
    aheads: tuple[Ahead, ...] = ()
    waits_s: tuple[float, ...] = ()

    @property
    def recording(self) -> Recording:
        """The generations, to be played back."""
        return Recording(self.question, self.pipeline, self.rounds)

    def to_json(self) -> dict[str, Any]:
        """Return the answer as plain JSON values."""
        return {
            "question": self.question,
            "text": self.text,
            "found": self.found,
            "citations": [asdict(citation) for citation in self.citations],
            "unsupported": list(self.unsupported),
            "hits": [{"score": hit.score, **asdict(hit.passage)} for hit in self.hits],
            "timings": dict(self.timings),
            "pipeline": self.pipeline,
            "lookaheads": [
                {**asdict(ahead), "hit_rate": ahead.hit_rate, "wasted_bytes": ahead.wasted_bytes}
                for ahead in self.aheads
            ],
            "waits_s": list(self.waits_s),
            "timeline": [asdict(span) for span in self.timeline.spans],
        }


def ask(
    retriever: Retriever,
    generator: Generator,
    question: str,
    *,
    pipeline: str = "plain",
    k: int = 4,
    nprobe: int | None = None,
    max_tokens: int = 160,
    min_score: float | None = None,
    lookahead: Mode = "progressive",
    lexical: Lexical | None = None,
    where: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    clock: Clock = time.perf_counter,
) -> Answer:
    """Answer a question from the index; `on_text` sees the text as it is generated.

    Passages below `min_score` (cosine; by default what is known for the encoder) are left out; with
    none left the answer is "Not found in the passages." and no model is asked. `where` are
    conditions on passages (filters.py). Raises UsageError for a wrong pipeline, k or nprobe, for
    conditions that no passage meets, and whatever the generator raises.
    """
    chosen = pipelines.find(pipeline)
    session = Session(
        retriever,
        generator,
        k=k,
        nprobe=nprobe,
        lookahead=lookahead,
        lexical=lexical,
        where=where,
        clock=clock,
    )
    floor = retriever.encoder.info.min_score if min_score is None else min_score
    with session:
        evidence = chosen.run(session, question)
    hits = [hit for hit in evidence.hits if floor is None or hit.score >= floor]
    show = on_text or (lambda text: None)
    if not hits:
        show(NOT_FOUND)
        return _answer(
            session, question, NOT_FOUND, found=False, written=[], hits=hits, pipeline=pipeline
        )
    markers, repeats = MarkerFilter(len(hits)), RepeatFilter()
    parts: list[str] = []

    def pass_on(text: str) -> None:
        if text:
            parts.append(text)
            show(text)

    if evidence.answer is not None:
        pass_on(repeats.feed(markers.feed(evidence.answer)))
    else:
        session.generate(
            prompts.answer(question, hits),
            max_tokens=max_tokens,
            on_text=lambda piece: pass_on(repeats.feed(markers.feed(piece))),
            enough=lambda: repeats.repeated,
        )
    pass_on(repeats.feed(markers.end()))
    pass_on(repeats.end())
    text = "".join(parts).rstrip()
    found = bool(text.strip()) and not _NOT_FOUND.match(text)
    return _answer(
        session, question, text, found=found, written=markers.written, hits=hits, pipeline=pipeline
    )


def cite(
    text: str, written: Sequence[tuple[int, int]], hits: Sequence[Hit]
) -> tuple[tuple[Citation, ...], tuple[str, ...]]:
    """Return the citations of a text, and its sentences that have and get none.

    `written` are the (number, position) of the markers in the text. A sentence with markers keeps
    exactly those; the others are attributed by the words they share with a passage.
    """
    found: list[Citation] = []
    unsupported: list[str] = []
    texts = [hit.passage.embedded for hit in hits]
    for start, end in citations.sentences(text):
        sentence = text[start:end]
        numbers = dict.fromkeys(number for number, at in written if start <= at < end)
        how: citations.How = "written"
        if not numbers:
            best = citations.attribute(sentence, texts)
            if best is not None:
                how, numbers = "attributed", {best[0] + 1: None}
            elif citations.content_words(sentence):
                unsupported.append(sentence)
        for number in numbers:
            passage = hits[number - 1].passage
            found.append(
                Citation(
                    number=number,
                    passage_id=passage.id,
                    source=passage.source,
                    start_line=passage.start_line,
                    end_line=passage.end_line,
                    how=how,
                    support=citations.support(sentence, texts[number - 1]),
                    sentence=(start, end),
                )
            )
    return tuple(found), tuple(unsupported)


def _answer(
    session: Session,
    question: str,
    text: str,
    *,
    found: bool,
    written: Sequence[tuple[int, int]],
    hits: Sequence[Hit],
    pipeline: str,
) -> Answer:
    cited, unsupported = cite(text, written, hits) if found else ((), ())
    timeline = session.timeline(question)
    seconds: dict[str, float] = {}
    for span in timeline.spans:
        key = f"{span.group}_s"
        seconds[key] = seconds.get(key, 0.0) + span.duration_s
    if timeline.spans[-1].group == "generate":
        seconds["ttft_s"] = timeline.spans[-1].detail["ttft_s"]
    seconds["total_s"] = session.elapsed_s()
    return Answer(
        question, text, found, cited, unsupported, tuple(hits), seconds, timeline, pipeline,
        tuple(session.rounds), tuple(session.aheads), tuple(session.waits_s),
    )  # fmt: skip
