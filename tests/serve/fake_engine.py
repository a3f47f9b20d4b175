"""An engine on an executor that computes nothing and checks what it reads."""

from __future__ import annotations

from typing import Any

from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.clock import VirtualClock
from toolkit.serve.engine import Engine
from toolkit.serve.kv.blocks import BlockPool
from toolkit.serve.policy import make
from toolkit.serve.request import Request, SamplingParams
from toolkit.serve.scheduler import Scheduler, SchedulerConfig


class FakeExecutor:
    """Draws a token that depends on the request and its position alone; checks what it reads.

    Its KV cache holds, per slot, the salt and all tokens up to the one written there: reading a
    block that somebody else has overwritten, or another's context, is noticed at once.
    """

    def __init__(self, clock: VirtualClock, pool: BlockPool) -> None:
        self.clock = clock
        self.pool = pool
        self.block_size = pool.block_size
        self.slots: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.batches: list[Batch] = []

    def start(self) -> None: ...

    def close(self) -> None: ...

    def run(self, batch: Batch) -> StepResult:
        self.batches.append(batch)
        tokens: list[int | None] = []
        for piece in batch.slices:
            request = piece.request
            known = tuple(request.tokens(0, piece.end))
            for position in range(piece.start, piece.end):
                block = request.block_ids[position // self.block_size]
                assert self.pool.state(block).value == piece.phase.value, "written by no writer"
                held = (request.cache_salt, known[: position + 1])
                self.slots[self._slot(request, position)] = held
            for position in range(piece.end):
                held = self.slots[self._slot(request, position)]
                assert held == (request.cache_salt, known[: position + 1]), f"{request.id}: {held}"
            tokens.append(next_token(request) if piece.samples else None)
        self.clock.advance(0.01 + 0.001 * batch.num_tokens)
        return StepResult(tuple(tokens))

    def _slot(self, request: Request, position: int) -> int:
        block = request.block_ids[position // self.block_size]
        return block * self.block_size + position % self.block_size


def next_token(request: Request) -> int:
    return 100 + (sum(request.prompt_ids) + 7 * len(request.output_ids)) % 50


def fake_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    prefill: str = "fcfs",
    decode: str = "fcfs",
    **limits: int | frozenset[int] | None,
) -> tuple[Engine, FakeExecutor]:
    settings = {"max_batch": 8, "step_tokens": 32, "max_context": num_blocks * block_size} | limits
    clock = VirtualClock()
    pool = BlockPool(num_blocks, block_size)
    executor = FakeExecutor(clock, pool)
    scheduler = Scheduler(
        SchedulerConfig(**settings),  # type: ignore[arg-type]
        pool,
        make(prefill),
        make(decode),
    )
    return Engine(scheduler, executor, clock), executor


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.scheduler.check_integrity()


def request(
    name: str, length: int = 3, max_tokens: int | None = 5, first: int = 1, **more: Any
) -> Request:
    prompt = tuple(range(first, first + length))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens), **more)


def ask(engine: Engine, name: str, prompt: tuple[int, ...], output: int = 1) -> Request:
    made = Request(name, prompt, SamplingParams(max_tokens=output))
    engine.add(made)
    run(engine)
    return made
