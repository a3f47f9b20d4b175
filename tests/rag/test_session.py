"""Rounds: lookahead beside a real stream changes no result, is recorded, played back and closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from toolkit.errors import UsageError
from toolkit.rag import (
    Encoder,
    Hit,
    Lexical,
    Message,
    Recording,
    Replay,
    Retriever,
    ask,
    build_index,
    find_corpus,
    find_mode,
)
from toolkit.rag.fusion import fuse
from toolkit.rag.pipelines import PIPELINES, find
from toolkit.rag.session import Session

SAID = "Aphids are eaten by ladybirds. Snails are collected at night. Spades dig the beds. "


class Slow:
    """Says the same words to everything, and lets other threads run between them."""

    def __init__(self, said: str = SAID) -> None:
        self.said = said
        self.num_asked = 0
        self.num_closed = 0

    def stream(self, messages: Sequence[Message], *, max_tokens: int = 256) -> Iterator[str]:
        self.num_asked += 1
        pause = threading.Event()
        try:
            for word in self.said.split(" ")[:max_tokens]:
                pause.wait(0.003)
                yield word + " "
        finally:
            self.num_closed += 1


@pytest.fixture(scope="module")
def path(garden: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session") / "index"
    build_index(
        find_corpus(str(garden)), path, Encoder.load(str(tiny_dir)),
        passage_words=8, num_lists=8, nprobe=3, encoding="f16",
    )  # fmt: skip
    return path


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("mode", ["question", "progressive"])
def test_lookahead_changes_no_result(path: Path, pipeline: str, mode: str) -> None:
    retriever, cold = Retriever.open(path), Retriever.open(path)
    for question in ("What eats aphids?", "Who digs?"):
        found = []
        for who, how in ((retriever, mode), (cold, "off")):
            who.tiers.clear()
            with Session(who, Slow(), k=3, lookahead=find_mode(how)) as session:
                evidence = find(pipeline).run(session, question)
            found.append([(hit.passage.id, hit.score) for hit in evidence.hits])
            assert bool(session.aheads) == (how != "off" and pipeline != "plain")
            for ahead in session.aheads:
                assert 0 <= ahead.used_bytes <= ahead.read_bytes
                assert 0 <= ahead.hit_rate <= 1
            assert session._foresight is None
        assert found[0] == found[1]
    # Nothing is wanted any more: all of it may be evicted.
    retriever.close()
    retriever.tiers.clear()
    assert retriever.tiers.arena.used_bytes == 0
    assert not retriever.tiers._queue


def test_lists_are_there_when_the_text_is_done(path: Path) -> None:
    retriever = Retriever.open(path)
    session = Session(retriever, Slow(), k=3, nprobe=8, lookahead="question")
    find("hyde").run(session, "What eats aphids?")
    (ahead,) = session.aheads
    assert ahead.hit_rate == 1.0
    spans = {span.name: span.detail for span in session.timeline("t").spans}
    assert spans["search"]["missing_bytes"] == 0
    assert spans["search"]["lookahead_read_bytes"] == ahead.read_bytes > 0
    # With everything in memory there is nothing to look ahead for.
    find("hyde").run(session, "What eats aphids?")
    assert len(session.aheads) == 1


def test_a_stream_that_breaks_leaves_nothing_wanted(path: Path) -> None:
    class Broken(Slow):
        def stream(self, messages: Sequence[Message], *, max_tokens: int = 256) -> Iterator[str]:
            yield "Aphids"
            raise OSError("cut")

    retriever = Retriever.open(path)
    session = Session(retriever, Broken(), k=3)
    with pytest.raises(OSError, match="cut"):
        find("hyde").run(session, "What eats aphids?")
    assert session._foresight is None
    retriever.close()  # after the reads in flight
    retriever.tiers.clear()
    assert retriever.tiers.arena.used_bytes == 0


def test_rounds_are_recorded_and_played_back(path: Path, tmp_path: Path) -> None:
    retriever = Retriever.open(path)
    live = Slow()
    answer = ask(retriever, live, "What eats aphids?", pipeline="irg", k=3, min_score=-1)
    assert live.num_asked == live.num_closed == 3
    answer.recording.save(tmp_path / "rounds.json")
    recording = Recording.load(tmp_path / "rounds.json")
    assert recording == answer.recording
    assert [each.name for each in recording.rounds] == ["draft", "draft", "generate"]
    waits: list[float] = []
    replay = Replay(recording, clock=lambda: 0.0, sleep=waits.append)
    again = ask(retriever, replay, "What eats aphids?", pipeline="irg", k=3, min_score=-1)
    assert (again.text, again.hits, again.citations) == (answer.text, answer.hits, answer.citations)
    assert max(waits) == pytest.approx(max(each.seconds for each in recording.rounds))
    with pytest.raises(UsageError, match="has 3 generations, and another was asked for"):
        list(replay.stream([]))


def test_what_models_say_becomes_searches(path: Path) -> None:
    retriever = Retriever.open(path)

    def asked(pipeline: str, said: str) -> list[str]:
        session = Session(retriever, Slow(said), k=3)
        find(pipeline).run(session, "Who digs?")
        return [s.detail["query"] for s in session.timeline("t").spans if s.name == "embed query"]

    assert asked("sub-question", "1. What digs?\n2. What rakes?") == [
        "Who digs?; What digs?; What rakes?"
    ]
    assert asked("iterative", "DONE") == ["Who digs?"]
    assert len(asked("iterative", "What about rakes?")) == 2  # not the same question twice
    assert asked("flare", "END") == ["Who digs?"]
    assert asked("flare", "Spades dig. More.")[1:] == ["Spades dig."] * 2
    with pytest.raises(UsageError, match="did you mean 'iterative'"):
        find("iteratve")


def test_words_and_vectors_are_fused_by_rank(path: Path) -> None:
    pytest.importorskip("bm25s")
    retriever = Retriever.open(path)
    words = Lexical.open(retriever)
    hits = words.search("ladybirds", 3)
    assert [("ladybirds" in hit.passage.text) for hit in hits] == [True]
    assert words.search("zebra", 3) == words.search("?", 3) == []
    session = Session(retriever, Slow(), k=4, lexical=words)
    assert hits[0].passage.id in [hit.passage.id for hit in session.search("ladybirds")]
    made = (path / "lexical" / "of.json").stat().st_mtime_ns
    Lexical.open(retriever)
    assert (path / "lexical" / "of.json").stat().st_mtime_ns == made
    passages = [hit.passage for hit in retriever.search("x", k=3, nprobe=8)]
    a, b, c = (Hit(passage, 0.5) for passage in passages)
    assert fuse([[a, b], [c, b]], 3)[0] == b
    assert fuse([[a], [a]], 3) == [a]


def test_mean_of_query_and_text_is_a_unit_vector(path: Path) -> None:
    vector = Retriever.open(path).vector("a", ["b", "c"])
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
