"""What this package leans on in torch beyond its documented interface, each with its self-test.

Everything else imports public names only. `self_test` runs first in every rank, so that a torch
that has moved is named at once and not by a wrong gradient. What pipelines need takes seconds to
import: it is in pipelines.py, whose own self-test runs where they are lowered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]  # not in __all__
    _resolve_process_group,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.errors import ToolkitError

__all__ = [
    "TorchDispatchMode", "group_of", "lying_as", "refuse", "relocate", "self_test",
    "start_fake_group",
]  # fmt: skip


def group_of(args: tuple[Any, ...]) -> dist.ProcessGroup:
    """Return the group that a c10d operator called with `args` is over.

    c10d's own operators take it boxed, the functional ones take its name, last.
    """
    boxed = next((found for found in args if isinstance(found, torch.ScriptObject)), None)
    if boxed is not None:
        return ProcessGroup.unbox(boxed)
    return _resolve_process_group(args[-1])


def start_fake_group(num_ranks: int) -> None:
    """Be rank 0 of `num_ranks` ranks that are not there; every call returns at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())


def relocate(parameter: nn.Parameter, memory: torch.Tensor) -> None:
    """Make `memory` that of a parameter, or of this rank's part of a split one; values are lost.

    `DTensor.to_local` of a parameter is a view, whose memory may be changed to no effect.
    """
    part = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
    part.data = memory


def lying_as(parameter: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
    """Return `part`, of the shape of this rank's part of `parameter` and on any device, as a tensor
    that lies as `parameter` does.

    `DTensor.from_local` would move it to the mesh's devices.
    """
    if not isinstance(parameter, DTensor):
        return part
    return DTensor(part, parameter._spec, requires_grad=False)  # type: ignore[call-arg]


def _modes_see_operators() -> bool:
    """Counting communication stands on a mode being handed every operator that runs."""
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2).neg()
    return "aten.neg.default" in seen


def self_test() -> None:
    """Raise ToolkitError naming what this torch does differently."""
    refuse(
        [
            (
                "DTensor._local_tensor and DTensor._spec",
                lambda: {"_local_tensor", "_spec"} <= set(DTensor.__slots__),
            ),
            ("TorchDispatchMode sees every operator", _modes_see_operators),
        ]
    )


def refuse(offers: Sequence[tuple[str, Callable[[], bool]]]) -> None:
    """Raise ToolkitError naming those that do not hold."""
    wrong = [what for what, works in offers if not works()]
    if wrong:
        raise ToolkitError(
            f"torch {torch.__version__} does not offer: {'; '.join(wrong)}",
            remedy="use the torch version in constraints.txt",
        )
