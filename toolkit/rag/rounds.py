"""The rounds of a question, written down and played back: the same texts at the same pace.

A pipeline run with a live model is recorded once; played back, its generations say what they said
when they said it, and its searches run anew. So retrieval is compared with the model out of the
way, and a pipeline is tested without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from toolkit import config, record
from toolkit.errors import UsageError
from toolkit.rag.generator import Message

KIND, VERSION = "rag-rounds", 1


@dataclass(frozen=True)
class Generated:
    """One generation: what was asked, and each piece with the second it came at."""

    name: str
    messages: tuple[Mapping[str, str], ...]
    max_tokens: int
    pieces: tuple[tuple[float, str], ...]
    seconds: float

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for _, text in self.pieces)


@dataclass(frozen=True)
class Recording:
    """The generations of one question, in order."""

    question: str
    pipeline: str
    rounds: tuple[Generated, ...]

    def save(self, path: Path) -> None:
        """Write to `path`, whole or not at all."""
        record.write(path, kind=KIND, version=VERSION, body=asdict(self))

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read what `save` wrote. Raises UsageError or FormatError."""
        body = record.read(path, kind=KIND, version=VERSION)["body"]
        return config.parse(cls, body, where=str(path))


class Replay:
    """A Generator that says what was recorded, at the recorded pace times `slower`.

    It checks only that the rounds are asked for in their order and not more of them: the prompts of
    later rounds hold the passages that were found, which may differ.
    """

    def __init__(
        self,
        recording: Recording,
        *,
        slower: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Play from the first round; `slower` 0 does not wait at all."""
        self._recording = recording
        self._slower = slower
        self._clock, self._sleep = clock, sleep
        self._next = 0

    def stream(self, messages: Sequence[Message], *, max_tokens: int = 256) -> Iterator[str]:
        """Yield the next round's pieces, each when it came. Raises UsageError after the last."""
        if self._next >= len(self._recording.rounds):
            raise UsageError(
                f"the recording of {self._recording.question!r} has {self._next} generations, and "
                "another was asked for",
                remedy="play it with the pipeline and settings it was recorded with",
            )
        this = self._recording.rounds[self._next]
        self._next += 1
        start_s = self._clock()
        for at_s, text in this.pieces:
            self._wait(start_s + at_s * self._slower)
            yield text
        self._wait(start_s + this.seconds * self._slower)

    def _wait(self, until_s: float) -> None:
        left_s = until_s - self._clock()
        if left_s > 0:
            self._sleep(left_s)
