"""The contract between the engine and whatever computes: run a batch, return its tokens."""

from __future__ import annotations

from typing import Protocol

from toolkit.errors import ToolkitError
from toolkit.serve.batch import Batch, StepResult


class StepLostError(ToolkitError):
    """A step has no result: what computed it raised or has gone. Its batch can be taken back."""

    kind = "step-lost"

    def __init__(self, batch: Batch, cause: BaseException) -> None:
        super().__init__(f"step {batch.step} was lost: {type(cause).__name__}: {cause}")
        self.batch = batch


class Executor(Protocol):
    """Computes batches over KV blocks that the scheduler numbers and the executor stores.

    `run` must write the KV of every position in a slice into the blocks of its request's table,
    may read every earlier position there, and draws one token where `Slice.samples` says so. A
    table may name other blocks of equal content from one step to the next.
    """

    def start(self) -> None:
        """Make ready in the thread that will call `run` (thread pools belong to their thread)."""
        ...

    def run(self, batch: Batch) -> StepResult:
        """Compute one step; the result has one entry per slice, in order."""
        ...

    def successor(self) -> Executor:
        """Return an executor of the same model with an empty cache; this one has died or hangs."""
        ...

    def close(self) -> None:
        """Give everything back. `run` is not called again."""
        ...
