"""Questions answered end to end: the right passage, citations that open, honest silence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from toolkit.errors import UsageError
from toolkit.rag import Answer, Encoder, Hit, Message, Retriever, ask, build_index, find_corpus
from toolkit.rag.answer import NOT_FOUND, cite


class Parrot:
    """Says what it was made with, in pieces of 3 characters, and remembers what it was asked."""

    def __init__(self, *replies: str) -> None:
        self.asked: list[Sequence[Message]] = []
        self.num_pieces = 0
        self.closed = 0
        self._replies = list(replies)

    def stream(self, messages: Sequence[Message], *, max_tokens: int = 256) -> Iterator[str]:
        self.asked.append(messages)
        reply = self._replies.pop(0)
        try:
            for i in range(0, len(reply), 3):
                self.num_pieces += 1
                yield reply[i : i + 3]
        finally:
            self.closed += 1


@pytest.fixture(scope="module")
def python_docs(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    """Some language topics, among them the with statement, from their own file."""
    corpus = find_corpus("python-docs")
    wanted = ("with", "assert", "while", "del", "raise", "global", "import", "lambda")
    titles = {f'The "{name}" statement' for name in wanted} | {"Lambdas", "Strings"}

    def documents(skipped: object) -> Iterator:
        every = corpus.documents(lambda source, why: None)
        return (document for document in every if document.title in titles)

    path = tmp_path_factory.mktemp("python-docs") / "index"
    part = type(corpus)(corpus.name, corpus.root, documents)
    build_index(part, path, Encoder.load(str(minilm_dir)), limit=90)
    return Retriever.open(path)


def _ask(retriever: Retriever, said: str, question: str, **how: float) -> tuple[Answer, str]:
    shown: list[str] = []
    answer = ask(retriever, Parrot(said), question, on_text=shown.append, **how)  # type: ignore[arg-type]
    return answer, "".join(shown)


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("how do I use the with statement", 'The "with" statement'),
        ("how can I delete a variable?", 'The "del" statement'),
        ("how does a while loop end?", 'The "while" statement'),
    ],
)
def test_a_question_finds_its_topic(python_docs: Retriever, question: str, title: str) -> None:
    hits = python_docs.search(question, k=3)
    assert hits[0].passage.title == title
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_citations_open_at_the_lines_they_name(python_docs: Retriever) -> None:
    said = (
        "The with statement is used to wrap the execution of a block [1]. "
        "Assert statements insert debugging assertions [9]. Zebras graze on the savannah."
    )
    answer, shown = _ask(python_docs, said, "How do I use the with statement?")
    assert answer.text == shown == said.replace(" [9]", "")
    assert answer.found
    written, *rest = answer.citations
    assert (written.number, written.how) == (1, "written")
    assert answer.text[slice(*written.sentence)].startswith("The with statement")
    assert all(citation.how == "attributed" for citation in rest)
    assert answer.unsupported[-1] == "Zebras graze on the savannah."
    for citation in answer.citations:
        passage = python_docs.store.passage(citation.passage_id)
        assert answer.hits[citation.number - 1].passage == passage
        file = python_docs.file(passage)
        assert file is not None
        lines = file.read_text().split("\n")[citation.start_line - 1 : citation.end_line]
        for word in passage.text.split():
            assert word in " ".join(lines)
        assert passage.text.split()[0] in lines[0]
        assert passage.text.split()[-1] in lines[-1]


def test_a_marker_belongs_to_the_sentence_it_stands_in(garden_index: Path) -> None:
    hits = [
        Hit(passage, 1.0) for passage in list(Retriever.open(garden_index).store.passages())[:3]
    ]
    text = "[1] Zebras graze. [2] Lions hunt.\n\n[3] Birds fly."
    written = [(1, 0), (2, text.index("[2]")), (3, text.index("[3]"))]
    found, unsupported = cite(text, written, hits)
    assert [(c.number, c.how, text[slice(*c.sentence)]) for c in found] == [
        (1, "written", "[1] Zebras graze. [2]"),
        (2, "written", "[1] Zebras graze. [2]"),
        (3, "written", "[3] Birds fly."),
    ]
    assert unsupported == ("Lions hunt.",)
    assert [c.support for c in found] == [0, 0, 0]


def test_without_markers_the_best_passage_is_attributed(python_docs: Retriever) -> None:
    (hit, *_) = python_docs.search("How do I use the with statement?", k=4)
    sentence = " ".join(hit.passage.text.split(".", maxsplit=1)[0].split()) + "."
    answer, _ = _ask(python_docs, sentence, "How do I use the with statement?")
    assert [(c.number, c.how, c.support) for c in answer.citations] == [(1, "attributed", 1.0)]
    assert answer.unsupported == ()


def test_far_passages_are_not_asked_about(python_docs: Retriever) -> None:
    parrot = Parrot("never said")
    answer = ask(python_docs, parrot, "What is the capital of France?", min_score=0.35)
    assert (answer.text, answer.found, answer.citations, answer.hits) == (NOT_FOUND, False, (), ())
    assert parrot.asked == []
    assert [span.name for span in answer.timeline.spans] == ["embed query", "search"]


def test_a_model_may_find_nothing(python_docs: Retriever) -> None:
    answer, _ = _ask(python_docs, "Not found in the passages. [1]", "Why is the sky blue?")
    assert (answer.found, answer.citations) == (False, ())


def test_the_prompt_numbers_the_passages(garden_index: Path) -> None:
    retriever, parrot = Retriever.open(garden_index), Parrot("Yes.")
    answer = ask(retriever, parrot, "Spades?", k=2)
    user = parrot.asked[0][-1]["content"]
    for number, hit in enumerate(answer.hits, start=1):
        assert f"Passage {number}: {hit.passage.title}\n{hit.passage.text}" in user
    assert user.index("Passage 2") < user.index("Question: Spades?")


def test_time_is_measured_on_one_timeline(garden_index: Path) -> None:
    ticks = iter(range(1000))
    answer = ask(
        Retriever.open(garden_index), Parrot("Hello."), "Spades?", clock=lambda: float(next(ticks))
    )
    spans = answer.timeline.spans
    assert [(s.name, s.track, s.source) for s in spans] == [
        ("embed query", "encoder", "measured"),
        ("search", "index", "measured"),
        ("generate", "generator", "measured"),
    ]
    assert spans[0].end_s == spans[1].start_s
    assert spans[1].end_s <= spans[2].start_s
    assert answer.timings["generate_s"] == spans[2].duration_s
    assert 0 < answer.timings["ttft_s"] < answer.timings["generate_s"]
    assert answer.timings["total_s"] >= spans[2].end_s


def test_a_loop_stops_the_generator(garden_index: Path) -> None:
    parrot = Parrot("Spades dig in the soil. " * 50)
    answer = ask(Retriever.open(garden_index), parrot, "Spades?")
    assert answer.text == "Spades dig in the soil."
    assert parrot.closed == 1
    assert parrot.num_pieces < 25


def test_an_empty_reply_is_no_answer(garden_index: Path) -> None:
    answer = ask(Retriever.open(garden_index), Parrot(""), "Spades?")
    assert (answer.text, answer.found, answer.citations) == ("", False, ())


def test_hyde_searches_with_what_the_model_made_up(garden_index: Path) -> None:
    retriever = Retriever.open(garden_index)
    target = retriever.store.passage(3)
    parrot = Parrot(target.embedded, "Done.")
    answer = ask(retriever, parrot, "zzz", pipeline="hyde", k=1)
    assert [span.name for span in answer.timeline.spans] == [
        "hypothetical passage", "embed query", "search", "generate",
    ]  # fmt: skip
    expected = retriever.vector("zzz", [target.embedded])
    assert answer.hits == tuple(retriever.retrieve(expected, k=1))
    mean = retriever.encoder.queries(["zzz"])[0] + retriever.encoder.documents([target.embedded])[0]
    assert expected @ mean / (mean @ mean) ** 0.5 == pytest.approx(1)


def test_a_wrong_pipeline_is_said(garden_index: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'hyde'"):
        ask(Retriever.open(garden_index), Parrot(), "?", pipeline="hide")
