"""The requests that wait, in a policy's order."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from toolkit.errors import ToolkitError, UsageError
from toolkit.serve.policy.base import Key, Policy
from toolkit.serve.request import Request, Status

# A request's key, a number that settles ties before requests would be compared, and the request.
_Entry = tuple[Key, int, Request]


class QueueFullError(ToolkitError):
    """The waiting queue has reached its cap; the request was not accepted."""

    kind = "queue-full"


class WaitingQueue:
    """A heap of waiting requests. One that has ended meanwhile is dropped when it surfaces."""

    def __init__(
        self, policy: Policy, *, max_requests: int | None = None, max_tokens: int | None = None
    ) -> None:
        """The caps are on what waits (None: no cap), and `check_room` alone heeds them."""
        self._policy = policy
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._heap: list[_Entry] = []
        self._ticks = itertools.count()
        # The key each was last placed with.
        self._keys: dict[str, Key] = {}
        self._rekey_s: float | None = None
        self.num_requests = 0
        self.num_tokens = 0

    def __iter__(self) -> Iterator[Request]:
        """Yield the waiting requests, in no particular order."""
        return (entry[2] for entry in self._heap if self._counts(entry))

    def _counts(self, entry: _Entry) -> bool:
        """Whether an entry is of a request that waits, and has its last place."""
        return entry[2].status is Status.WAITING and self._keys.get(entry[2].id) is entry[0]

    def check_room(
        self, num_requests: int, num_tokens: int, *, num_coming: int = 0, tokens_coming: int = 0
    ) -> None:
        """Raise QueueFullError when that many more requests and prompt tokens may not queue.

        For whoever lets requests in, before `push`; one let in is never turned away afterwards.
        `coming` counts those let in that have not been pushed yet. Raises UsageError when they
        would not fit into an empty queue.
        """
        caps = (
            ("requests", num_requests, self.num_requests + num_coming, self._max_requests),
            ("tokens", num_tokens, self.num_tokens + tokens_coming, self._max_tokens),
        )
        for what, more, there, cap in caps:
            if cap is not None and more > cap:
                raise UsageError(
                    f"{more} {what} at once are more than may ever wait, which is {cap}",
                    remedy="send fewer at a time, or raise the cap",
                )
            if cap is not None and there + more > cap:
                raise QueueFullError(
                    f"the queue is full: {there + more} {what} would wait and the cap is {cap}",
                    remedy="try again later",
                )

    def push(self, request: Request, now: float) -> None:
        """Let a request wait at the place its policy gives it."""
        request.status = Status.WAITING
        self.num_requests += 1
        self.num_tokens += request.num_tokens
        self._place(request, now)

    def _place(self, request: Request, now: float) -> None:
        """Note a request's place; one it had before counts no more."""
        key = self._policy.key(request, request.program, now)
        self._keys[request.id] = key
        heapq.heappush(self._heap, (key, next(self._ticks), request))

    def head(self) -> tuple[Key, Request] | None:
        """Return the first request and its key, leaving it there."""
        while self._heap and not self._counts(self._heap[0]):
            heapq.heappop(self._heap)
        return (self._heap[0][0], self._heap[0][2]) if self._heap else None

    def pop(self) -> Request:
        """Take the first request out; the caller has looked at `head`."""
        request = heapq.heappop(self._heap)[2]
        self.discard(request)
        return request

    def discard(self, request: Request) -> None:
        """Count out a request that ends while waiting; its status must change right after."""
        assert request.status is Status.WAITING, f"{request.id} does not wait"
        self._keys.pop(request.id, None)
        self.num_requests -= 1
        self.num_tokens -= request.num_tokens

    def refresh(self, now: float) -> None:
        """Sort anew when the policy said that keys would by now have changed by themselves."""
        if self._rekey_s is not None and now >= self._rekey_s:
            changed = self._policy.changed(now)
            if changed is None:
                self.rekey(now)
            else:
                for request in changed:
                    if request.status is Status.WAITING:
                        self._place(request, now)
        self._rekey_s = self._policy.next_change(now)

    def rekey(self, now: float) -> None:
        """Sort anew: something that keys depend on has changed."""
        waiting = list(self)
        self._keys = {each.id: self._policy.key(each, each.program, now) for each in waiting}
        self._heap = [(self._keys[each.id], next(self._ticks), each) for each in waiting]
        heapq.heapify(self._heap)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the counts are those of what waits."""
        waiting = list(self)
        assert len(waiting) == self.num_requests, "the count of waiting requests is off"
        assert sum(r.num_tokens for r in waiting) == self.num_tokens, "queued tokens are off"
        for request in waiting:
            assert not request.block_ids, f"{request.id} waits and holds blocks"
            assert not request.in_flight, f"{request.id} waits and is in flight"
