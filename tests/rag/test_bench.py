"""The comparison: five arms find the same, start cold, and are summed up as they ran."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from toolkit.cli.rag.bench import retrievers_of
from toolkit.errors import ToolkitError, UsageError
from toolkit.rag import Encoder, Message, Retriever, bench, build_index, find_corpus


class Says:
    def __init__(self, text: str) -> None:
        self.text = text

    def stream(self, messages: Sequence[Message], *, max_tokens: int = 256) -> Iterator[str]:
        yield from (word + " " for word in self.text.split()[:max_tokens])


@pytest.fixture(scope="module")
def path(garden: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "index"
    build_index(
        find_corpus(str(garden)), path, Encoder.load(str(tiny_dir)),
        passage_words=8, num_lists=6, nprobe=3,
    )  # fmt: skip
    return path


def test_all_arms_find_the_same_from_cold(path: Path, tmp_path: Path) -> None:
    retriever = Retriever.open(path)
    arms = retrievers_of(retriever, bench.ARMS, tmp_path / "faiss", threads=1)
    questions = ["Who digs?", "What eats lettuce?", "When is frost?"]
    done: list[int] = []
    runs = bench.measure(
        arms, Says, questions, pipeline="hyde", k=3, answer_tokens=4, progress=done.append
    )
    assert done == [1, 2, 3]
    assert len(runs) == 15
    # ABBA: the warm-up runs forwards, the first question that counts backwards.
    assert [run.arm for run in runs[:10]] == [*bench.ARMS[::-1], *bench.ARMS]
    found = {each.arm: each for each in bench.summarise(runs)}
    assert list(found) == list(bench.ARMS)
    assert found["off"].read_bytes > 0
    assert found["off"].hit_rate == found["ram"].read_bytes == 0
    assert all(run.aheads for run in runs if run.arm in ("question", "progressive"))
    assert len(bench.ratios(runs, "off", "ram")) == 3
    # The copy is used again.
    bench.FaissOnDisk(retriever, tmp_path / "faiss", threads=1)


def test_a_model_that_says_something_else_each_time_is_told(path: Path) -> None:
    texts = iter(f"{word} " * 9 for word in ("dig", "rake", "frost", "bread", "snail", "seed"))
    retriever = Retriever.open(path)
    arms = retrievers_of(retriever, bench.find_arms("off,question"), path, threads=1)
    with pytest.raises(ToolkitError, match="arms found different passages"):
        bench.measure(arms, lambda question: Says(next(texts)), ["a", "b", "c"], pipeline="hyde",
                      nprobe=1, k=1)  # fmt: skip
    with pytest.raises(UsageError, match="did you mean 'progressive'"):
        bench.find_arms("off,progresive")
