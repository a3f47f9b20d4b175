"""torch's pipeline runtime, run by a plan's own table of actions.

torch puts in the sends and receives: a result is sent right after the action that made it, and the
receiver posts its receives in the order of the sends, ahead of their use. So messages that overtake
one another (ZB-V, DualPipeV) are matched rightly, and a table that cannot run is refused.

What a rank holds beside parameters and activations, as torch 2.13 does it:
- From the first step on, for every microbatch, a receive buffer for each tensor that enters one
  of its stages from another rank, and one for each gradient that comes back into it.
- Every tensor sent (a stage's outputs, the gradients of its inputs) until the end of the step,
  because torch waits for all sends there.
- Between I and W, what W needs: see deferred.py.
- Between stages on one rank (the turn of a V) tensors are handed over; nothing is sent or copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.plan.lower.compat.pipelines import PipelineRuntime, TorchAction
from toolkit.plan.order.action import Rows


class Runtime(PipelineRuntime):  # type: ignore[misc]  # torch's class is untyped
    """Runs `rows`, one a position. The last stage's output is its microbatch's loss; backward
    starts from the loss over `divisor`.

    torch finds a loss by the order of the last stage's forwards; here it goes by microbatch, so
    that a table may run them in any order.
    """

    def __init__(self, stages: Sequence[Any], rows: Rows, microbatches: int, divisor: int) -> None:
        super().__init__(
            list(stages),
            microbatches,
            loss_fn=lambda loss, _: loss,  # there has to be one for backward to be run
            scale_grads=False,  # the losses are divided instead
        )
        self._divisor = divisor
        self._pending: dict[int, Tensor] = {}
        self._losses: dict[int, Tensor] = {}
        self._prepare_schedule_with_comms(
            {
                position: [TorchAction.from_str(str(action)) for action in row]
                for position, row in enumerate(rows)
            }
        )

    def run(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """Run one step over the samples in `inputs`; return their mean loss where it is made."""
        given: dict[str, Any] = dict(inputs)
        self.step(return_outputs=False, **given)
        losses = [loss for _, loss in sorted(self._losses.items())]
        self._losses.clear()
        # Microbatches are of equal size: the mean of their means is the mean.
        return torch.stack(losses).mean() if losses else None

    def _maybe_compute_loss(
        self, stage: Any, output: Any, target_mbs: Any, mb_index: int, loss_kwargs: Any = None
    ) -> None:
        if stage.is_last:
            self._pending[mb_index] = output
            self._losses[mb_index] = output.detach().clone()

    def _maybe_get_loss(self, stage: Any, mb_index: int) -> Tensor | None:
        return self._pending.pop(mb_index) / self._divisor if stage.is_last else None

    def _update_losses(self, stages: Any, losses: Any) -> None:
        """`run` returns them."""
