"""Mixed load for as long as is asked: nothing crashes, hangs or leaks, and memory stays flat.

TOOLKIT_SOAK_S=1800 python -m pytest tests/serve/test_soak.py -m slow
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from toolkit.serve.server.app import Doorkeeping

SOAK_S = float(os.environ.get("TOOLKIT_SOAK_S", "40"))
WORDS = [
    "the",
    "sea",
    "is",
    "wide",
    "and",
    "the",
    "sky",
    "is",
    "high",
    "above",
    "the",
    "hills",
    "of",
    "the",
    "old",
    "country",
]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Client:
    """One of several that ask, stream, leave, and send nonsense, by its own dice."""

    def __init__(self, served: Any, seed: int) -> None:
        self.served = served
        self.draw = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.actions = [self.ask, self.stream, self.leave, self.chat, self.embed, self.form]
        self.actions += [self.malformed, self.oversized, self.hang_up]

    def run(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            action = self.draw.choice(self.actions)
            try:
                action()
                self.seen[action.__name__] += 1
            except (openai.RateLimitError, openai.BadRequestError) as error:
                self.seen[type(error).__name__] += 1

    def prompt(self) -> str:
        shared = " ".join(WORDS * self.draw.randint(0, 3))
        return shared + " ".join(self.draw.choices(WORDS, k=self.draw.randint(1, 40)))

    def options(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt(),
            "max_tokens": self.draw.randint(1, 60),
            "temperature": self.draw.choice([0.0, 0.8, 1.5]),
            "n": self.draw.choice([1, 1, 3]),
            "extra_body": {"priority": self.draw.randint(-2, 2)},
        }

    def ask(self) -> None:
        extra = self.draw.choice([{}, {"logprobs": 2, "echo": True}, {"presence_penalty": 1.0}])
        assert self.served.ask(**(self.options() | extra)).choices

    def stream(self) -> None:
        for _ in self.served.ask(**self.options(), stream=True):
            pass

    def leave(self) -> None:
        stream = self.served.ask(**(self.options() | {"max_tokens": 400}), stream=True)
        for _ in range(self.draw.randint(0, 5)):
            next(iter(stream), None)
        stream.close()

    def chat(self) -> None:
        tool = {"type": "function", "function": {"name": "f"}}
        self.served.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": self.prompt()}],
            max_tokens=20,
            tools=[tool],
            tool_choice=self.draw.choice(["auto", "none"]),
        )

    def embed(self) -> None:
        self.served.client.embeddings.create(model="tiny", input=[self.prompt(), "a"])

    def form(self) -> None:
        found = self.served.ask(prompt="a", extra_body={"guided_regex": "[ab]{5}"})
        assert len(found.choices[0].text) == 5

    def post(self, content: bytes, **more: Any) -> httpx.Response:
        headers = {"content-type": "application/json"}
        url = f"{self.served.url}/v1/completions"
        return httpx.post(url, content=content, headers=headers, **{"timeout": 60, **more})

    def malformed(self) -> None:
        nonsense = self.draw.choice([b"{", b"[]", b'{"model": "tiny"}', b"\xff", b'{"prompt": 1}'])
        assert self.post(nonsense).status_code == 400

    def oversized(self) -> None:
        """A body past the door's limit, and a prompt past the context."""
        assert self.post(b'{"prompt": "' + b"a" * 200_000).status_code == 413
        assert self.post(b'{"model": "tiny", "prompt": "' + b"a " * 3000 + b'"}').status_code == 400

    def hang_up(self) -> None:
        body = b'{"model": "tiny", "prompt": "a b c", "max_tokens": 900, "ignore_eos": true}'
        with contextlib.suppress(httpx.TimeoutException):
            self.post(body, timeout=httpx.Timeout(30, read=0.05))


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 240)
def test_mixed_load_leaves_nothing_behind(start: Callable[..., Any]) -> None:
    served = start(
        max_batch=8, max_queue=12, block_size=8, max_context=1000, kv_bytes=160 * 8 * 256,
        step_tokens=64, policy="priority", door=Doorkeeping(max_body_bytes=100_000),
    )  # fmt: skip
    # What is imported and compiled at first use is no leak.
    for action in Client(served, -1).actions:
        action()
    begun = time.monotonic()
    clients = [Client(served, seed) for seed in range(12)]
    threads = [threading.Thread(target=client.run, args=(begun + SOAK_S,)) for client in clients]
    for thread in threads:
        thread.start()
    time.sleep(SOAK_S / 3)
    early_bytes = resident_bytes()
    for thread in threads:
        thread.join(SOAK_S + 120)
        assert not thread.is_alive(), "a client hangs"
    served.until(lambda: not served.service.engine.has_work)
    late_bytes = resident_bytes()
    scheduler = served.service.engine.scheduler
    scheduler.check_integrity()
    assert scheduler.pool.num_used == 0
    served.until(lambda: not served.service._calls)
    assert not served.service.engine._streams
    assert served.metric("toolkit:engine_restarts_total") == 0
    assert httpx.get(f"{served.url}/health").status_code == 200
    seen = sum((client.seen for client in clients), Counter())
    assert {action.__name__ for action in clients[0].actions} <= set(seen), seen
    assert scheduler.num_preemptions > 0
    assert late_bytes < early_bytes * 1.05 + 30 * 2**20, f"{early_bytes} -> {late_bytes}: {seen}"
