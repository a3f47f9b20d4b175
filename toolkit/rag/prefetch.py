"""Lookahead: while text is generated, bring in the lists that the finished text will want.

The question alone ranks the lists nearly as its rewritten form will (TeleRAG, arXiv 2502.20969), so
their reads hide behind the generation. What may be read is what the window holds,

    budget = min(bytes_per_s x token_s x num_tokens, multiple x probed bytes, share of the arena)

with both rates measured as they go. The budget is spent in instalments: each time another part of
the text is there, the lists are ranked anew on it, reads that still wait are dropped, and the next
instalment goes to what now looks best. One instalment is the published algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toolkit.rag.claims import Prefetch
from toolkit.rag.store import Key
from toolkit.rag.tiers import Tiers, Traffic

_SMOOTHING = 0.3  # weight of the newest measurement


class Pace:
    """How fast the disk and the generator are, measured and smoothed over requests."""

    def __init__(self, *, bytes_per_s: float = 5e8, token_s: float = 0.05) -> None:
        """Begin with a guess of either, which the first measurements replace."""
        self.bytes_per_s = bytes_per_s
        self.token_s = token_s
        self._seen_disk = self._seen_generator = False
        self._num_tokens: dict[str, float] = {}

    def generated(self, num_tokens: int, seconds: float) -> None:
        """Take note of a generation that ended."""
        if num_tokens and seconds > 0:
            old = self.token_s if self._seen_generator else None
            self.token_s = _smooth(old, seconds / num_tokens)
            self._seen_generator = True

    def said(self, name: str, num_tokens: int) -> None:
        """Take note of how long a kind of generation became."""
        self._num_tokens[name] = _smooth(self._num_tokens.get(name), num_tokens)

    def expected(self, name: str, max_tokens: int) -> int:
        """Return how long such a generation will become: as those before, or all it may."""
        return max(1, min(max_tokens, round(self._num_tokens.get(name, max_tokens))))

    def read(self, before: Traffic, after: Traffic) -> None:
        """Take note of what was read between two counts, while reads were in flight."""
        busy_s = after.busy_s - before.busy_s
        if busy_s > 0 and after.read_bytes > before.read_bytes:
            old = self.bytes_per_s if self._seen_disk else None
            self.bytes_per_s = _smooth(old, (after.read_bytes - before.read_bytes) / busy_s)
            self._seen_disk = True


@dataclass(frozen=True)
class Ahead:
    """What one lookahead was good for (measured), by bytes.

    `hit_rate` is what was in memory of what the search wanted, whoever brought it.
    """

    budget_bytes: int
    read_bytes: int  # brought in, or in flight when the text was done
    used_bytes: int  # of read_bytes, those that the search wanted
    wanted_bytes: int  # of all lists the search wanted
    resident_bytes: int  # of wanted_bytes, those in memory when the text was done

    @property
    def hit_rate(self) -> float:
        """The share of the wanted bytes that was in memory; 1 when none was wanted."""
        return self.resident_bytes / self.wanted_bytes if self.wanted_bytes else 1.0

    @property
    def wasted_bytes(self) -> int:
        """The bytes read for nothing (they may still serve a later search)."""
        return self.read_bytes - self.used_bytes


class Lookahead:
    """The lookahead of one generation. Use inside `with`: leaving it cancels what still waits.

    with Lookahead(tiers, pace, nprobe=256) as ahead:
        ahead.begin(vector of the question, num_tokens)
        for each piece of text:  if ahead.due(tokens so far): ahead.revise(vector so far)
        measured = ahead.settle(probes of the finished text, seconds)
        search(tiers, ...)
    """

    def __init__(
        self,
        tiers: Tiers,
        pace: Pace,
        *,
        nprobe: int,
        multiple: float = 2.0,
        num_instalments: int = 4,
        arena_share: float = 0.9,
    ) -> None:
        """Bring in at most `multiple` times the bytes of `nprobe` lists.

        `arena_share` of the memory is the most that one lookahead asks for; what others hold or
        want it does not get anyway.
        """
        self._tiers, self._pace = tiers, pace
        self._store = tiers.store
        self._nprobe, self._multiple = nprobe, multiple
        self._num_instalments, self._arena_share = num_instalments, arena_share
        self._num_tokens = 0
        self._budget_bytes = 0
        self._num_spent = 0  # instalments
        self._asked: dict[Key, int] = {}  # bytes of what was not there, and was not dropped since
        self._parts: list[Prefetch] = []
        self._before = tiers.traffic()

    def __enter__(self) -> Lookahead:
        return self

    def __exit__(self, *_: object) -> None:
        for part in self._parts:
            part.close()
        self._parts.clear()

    def begin(self, vector_D: np.ndarray, num_tokens: int) -> None:  # noqa: N803
        """Start with the vector [D] of the question, for a text of about `num_tokens`."""
        store = self._store
        self._num_tokens = max(1, num_tokens)
        probes = store.quantizer.rank(vector_D, self._nprobe)
        self._budget_bytes = int(
            min(
                self._pace.bytes_per_s * self._pace.token_s * self._num_tokens,
                self._multiple * sum(map(store.num_bytes, store.keys(probes))),
                self._arena_share * self._tiers.arena.budget_bytes,
            )
        )
        self._spend(vector_D)

    def due(self, num_tokens: int) -> bool:
        """Say whether, with so many tokens there, the next instalment is due."""
        share = num_tokens / self._num_tokens
        return self._num_spent < self._num_instalments and (
            share >= self._num_spent / self._num_instalments
        )

    def revise(self, vector_D: np.ndarray) -> None:  # noqa: N803
        """Rank anew by the vector [D] of question and text so far, and spend an instalment."""
        for part in self._parts:
            for key in part.drop_unread():
                self._asked.pop(key, None)
        self._spend(vector_D)

    def _spend(self, vector_D: np.ndarray) -> None:  # noqa: N803
        """Ask for the best lists that are not there, as far as the instalments so far go."""
        tiers, store = self._tiers, self._store
        self._num_spent += 1
        allowed = self._budget_bytes * self._num_spent // self._num_instalments
        left_bytes = allowed - sum(self._asked.values())
        resident = tiers.resident()
        most = min(store.quantizer.num_lists, max(1, round(self._multiple * self._nprobe)))
        chosen = []
        for key in store.keys(store.quantizer.rank(vector_D, most)):
            if key not in resident and key not in self._asked:
                size = store.num_bytes(key)
                if size > left_bytes:
                    break
                left_bytes -= size
                self._asked[key] = size
            chosen.append(key)  # what is there already is wanted too, so it stays
        self._parts.append(tiers.prefetch(chosen, store))

    def settle(
        self, probes: np.ndarray, seconds: float, num_tokens: int | None = None
    ) -> Ahead:  # fmt: skip
        """End the window: the text took `seconds`, and its search will look into `probes`.

        `num_tokens` is how long the text became, when that is known to differ.

        Lists that are not among them are no longer wanted. Those that are stay until the search has
        leased them, so call this before it and leave the `with` after it.
        """
        tiers, store = self._tiers, self._store
        resident = tiers.resident()
        wanted = set(store.keys(probes))
        unread = {key for part in self._parts for key in part.unread()}
        for part in self._parts:
            part.keep(wanted.__contains__)
        read = {key: size for key, size in self._asked.items() if key not in unread}
        self._pace.generated(self._num_tokens if num_tokens is None else num_tokens, seconds)
        self._pace.read(self._before, tiers.traffic())
        return Ahead(
            budget_bytes=self._budget_bytes,
            read_bytes=sum(read.values()),
            used_bytes=sum(size for key, size in read.items() if key in wanted),
            wanted_bytes=sum(map(store.num_bytes, wanted)),
            resident_bytes=sum(map(store.num_bytes, wanted & resident)),
        )


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)
