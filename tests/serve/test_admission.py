"""Who may wait, who never can be served, and limits that contradict each other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from toolkit.errors import UsageError
from toolkit.serve.kv.blocks import BlockPool
from toolkit.serve.policy import make
from toolkit.serve.queue import QueueFullError
from toolkit.serve.scheduler import Scheduler, SchedulerConfig

sys.path.append(str(Path(__file__).parent))
from fake_engine import fake_engine, request


def test_caps_on_what_waits() -> None:
    engine, _ = fake_engine(max_queue=2, max_queue_tokens=10)
    check_room = engine.scheduler.queue.check_room
    check_room(2, 10)
    with pytest.raises(QueueFullError, match="3 requests would wait and the cap is 2"):
        check_room(2, 3, num_coming=1, tokens_coming=3)
    with pytest.raises(QueueFullError, match="11 tokens"):
        check_room(1, 8, num_coming=1, tokens_coming=3)
    # Coming back later would not help these.
    with pytest.raises(UsageError, match="3 requests at once are more than may ever wait"):
        check_room(3, 3)
    with pytest.raises(UsageError, match="11 tokens at once"):
        check_room(1, 11)


def test_what_can_never_be_served_is_refused() -> None:
    engine, _ = fake_engine(num_blocks=4, block_size=4, max_context=16)
    with pytest.raises(UsageError, match="16 tokens and the context is 16"):
        engine.add(request("oversized", 16))
    with pytest.raises(UsageError, match="empty"):
        engine.add(request("empty", 0))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_context": 65}, "holds 64 tokens, fewer than a context of 65"),
        ({"max_context": 64, "step_tokens": 8}, "nothing for prefill"),
        ({"max_context": 64, "max_batch": 0}, "none"),
    ],
)
def test_contradictory_limits_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Scheduler(
            SchedulerConfig(**({"max_batch": 8, "step_tokens": 32} | limits)),
            BlockPool(16, 4),
            make("fcfs"),
            make("fcfs"),
        )
