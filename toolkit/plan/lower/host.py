"""The optimizer on the host (ZeRO-Offload, Ren et al. 2021, arXiv 2101.06840), over any rung.

The device keeps parameters and gradients; the host a copy of what this rank updates, its gradients,
and in the optimizer its moments. Gradients go down, each as soon as the rung says that it is
reduced and the rest after the step; updated parameters come up before `after_update` gathers them.

On CUDA the host's copies are pinned and moved by a stream of their own, beside what the device
computes: that has never run on hardware. On a CPU the host is the device, and copies are copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from toolkit.plan.lower.compat import lying_as
from toolkit.plan.lower.data import local
from toolkit.plan.lower.lowered import Batch, Lowered


class OnHost(Lowered):
    """A rung whose optimizer lives on the host: `optimizer_parameters` are plain tensors there."""

    def __init__(self, inner: Lowered) -> None:
        super().__init__(inner.plan, inner.recorder)
        self.inner = inner
        self.parameters = inner.parameters
        self.rung = f"{inner.rung}, optimizer on the host"
        self._landed: set[int] = set()
        # Made when an optimizer asks for them: weights may be made after the lowering.
        self._twins: dict[str, Twin] = {}
        self._by_parameter: dict[int, Twin] = {}
        self._stream: torch.cuda.Stream | None = None
        inner.lands(self._land)

    def step(self, batch: Batch) -> Tensor | None:
        self._landed.clear()
        loss = self.inner.step(batch)
        if self._twins:
            with self.recorder.span("gradients to the host", "copy"):
                self._land(None, [twin.device for twin in self._twins.values()])
                if self._stream is not None:
                    self._stream.synchronize()
        return loss

    def optimizer_parameters(self) -> dict[str, nn.Parameter]:
        if not self._twins:
            held = self.inner.optimizer_parameters()
            self._twins = {name: Twin(parameter) for name, parameter in held.items()}
            self._by_parameter = {id(twin.device): twin for twin in self._twins.values()}
            if any(local(parameter).is_cuda for parameter in held.values()):
                self._stream = torch.cuda.Stream()
        return {name: twin.host for name, twin in self._twins.items()}

    def after_update(self) -> None:
        with self.recorder.span("parameters from the host", "copy"):
            with self._beside(None):
                for twin in self._twins.values():
                    twin.up()
            if self._stream is not None:
                torch.cuda.current_stream().wait_stream(self._stream)
        self.inner.after_update()

    def restored(self) -> None:
        self.inner.restored()
        for twin in self._twins.values():
            twin.take()

    def saved(self, name: str, value: Tensor) -> Any:
        return self.inner.saved(name, lying_as(self._twins[name].device, value))

    def global_loss(self, loss: Tensor | None) -> float:
        return self.inner.global_loss(loss)

    def zero_gradients(self) -> None:
        self.inner.zero_gradients()

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self.inner.whole_parameters()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        return self.inner.gradients()

    def _land(self, work: dist.Work | None, parameters: Iterable[nn.Parameter]) -> None:
        """Copy gradients that are not there yet."""
        found = [
            self._by_parameter[id(parameter)]
            for parameter in parameters
            if id(parameter) in self._by_parameter and id(parameter) not in self._landed
        ]
        if not found:
            return
        self._landed.update(id(twin.device) for twin in found)
        with self._beside(work):
            for twin in found:
                twin.down()

    @contextlib.contextmanager
    def _beside(self, work: dist.Work | None) -> Iterator[None]:
        """On CUDA, a stream of its own: after `work`, or after what is queued so far."""
        if self._stream is None:
            if work is not None:
                work.wait()
            yield
            return
        if work is None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if work is not None:
                work.wait()
            yield


class Twin:
    """One parameter on the device, or this rank's part of it, and its copy on the host."""

    def __init__(self, device: nn.Parameter) -> None:
        self.device = device
        part = local(device).detach()
        self.host = nn.Parameter(_host_memory(part))
        self._gradient = _host_memory(part)
        self.take()
        self.down()

    def take(self) -> None:
        """Copy the parameter's values down."""
        with torch.no_grad():
            self.host.copy_(local(self.device))

    def down(self) -> None:
        """Copy the gradient, where there is one."""
        if self.device.grad is None:
            self.host.grad = None
            return
        self._gradient.copy_(local(self.device.grad), non_blocking=True)
        self.host.grad = self._gradient

    def up(self) -> None:
        """Copy the parameter's values up."""
        with torch.no_grad():
            local(self.device).copy_(self.host, non_blocking=True)


def _host_memory(like: Tensor) -> Tensor:
    """Memory of a tensor's shape and type on the host; pinned where it is copied from a GPU."""
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
