"""What torch's ways of splitting a model add to its operators: DTensor's dispatch, FSDP2's copies.

Linears of their own, wrapped and plain, run side by side; what is more, less the collectives
alone, is the wrapper's. Nothing of a planned model is in here.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from toolkit.plan.predict import costs
from toolkit.plan.profile.fit import Observation

_WARM_UP, _REPEATS = 3, 9
# DTensor's cost does not depend on the size; FSDP2's does.
_FEATURES, _NUM_PAIRS = 64, 8
_UNIT_FEATURES, _NUM_UNITS = (64, 1024), 4


def observe(num_ranks: int) -> list[Observation]:
    """Return what wrapping adds, on all ranks at once."""
    mesh = init_device_mesh("cpu", (num_ranks,))
    return [*_split_linears(mesh), *(one for size in _UNIT_FEATURES for one in _sharded(size))]


def _split_linears(mesh: DeviceMesh) -> Iterator[Observation]:
    """Linears by columns, then rows; and the update of what is split."""
    num_ranks = mesh.size()
    width = _FEATURES * num_ranks
    plain = nn.Sequential(
        *(nn.Linear(*sizes, bias=False) for _ in range(_NUM_PAIRS)
          for sizes in ((_FEATURES, width), (width, _FEATURES)))
    )  # fmt: skip
    styles: dict[str, ParallelStyle] = {
        str(place): RowwiseParallel() if place % 2 else ColwiseParallel()
        for place in range(2 * _NUM_PAIRS)
    }
    split = parallelize_module(copy.deepcopy(plain), mesh, styles, src_data_rank=None)
    x = torch.randn(4, _FEATURES, requires_grad=True)
    reduced = torch.zeros(4, _FEATURES)
    meeting_s = _median(lambda: dist.all_reduce(reduced)) / 2  # a pair meets once each way
    for name, more in zip(
        (costs.SPLIT_LINEAR, f"{costs.SPLIT_LINEAR} backward"),
        _more(split, plain, x),
        strict=True,
    ):
        yield Observation(name, (), max(0.0, more / (2 * _NUM_PAIRS) - meeting_s))
    seconds = []
    for module in (split, plain):
        optimizer = torch.optim.AdamW(module.parameters())
        seconds.append(_median(optimizer.step))
    yield Observation(
        costs.SPLIT_UPDATE, (), max(0.0, (seconds[0] - seconds[1]) / (2 * _NUM_PAIRS))
    )


def _sharded(features: int) -> Iterator[Observation]:
    """Units under FSDP2: gathered for forward and backward, reduced in backward."""
    plain = nn.Sequential(*(nn.Linear(features, features, bias=False) for _ in range(_NUM_UNITS)))
    wrapped = copy.deepcopy(plain)
    for unit in wrapped:
        fully_shard(unit)
    fully_shard(wrapped)
    x = torch.randn(1, features, requires_grad=True)
    num_bytes = 4 * features * features
    whole = torch.zeros(features, features)
    part = torch.zeros(features // dist.get_world_size(), features)
    gather_s = _median(lambda: dist.all_gather_into_tensor(whole, part))
    scatter_s = _median(lambda: dist.reduce_scatter_tensor(part, whole))
    forward_s, backward_s = _more(wrapped, plain, x)
    gathering_s = max(0.0, forward_s / _NUM_UNITS - gather_s)
    reducing_s = max(0.0, backward_s / _NUM_UNITS - gather_s - gathering_s - scatter_s)
    yield Observation(costs.GATHER, (), gathering_s, num_bytes)
    yield Observation(costs.REDUCE, (), reducing_s, num_bytes)


def _more(wrapped: nn.Module, plain: nn.Module, x: Tensor) -> tuple[float, float]:
    """Seconds that forward and backward of `wrapped` take beyond those of `plain`."""
    first, second = _passes(wrapped, x), _passes(plain, x)
    return first[0] - second[0], first[1] - second[1]


def _passes(module: nn.Module, x: Tensor) -> tuple[float, float]:
    forward, backward = [], []
    for _ in range(_WARM_UP + _REPEATS):
        for parameter in module.parameters():
            parameter.grad = None
        dist.barrier()
        begun_s = time.perf_counter()
        loss = module(x).sum()
        turned_s = time.perf_counter()
        loss.backward()
        forward.append(turned_s - begun_s)
        backward.append(time.perf_counter() - turned_s)
    return statistics.median(forward[_WARM_UP:]), statistics.median(backward[_WARM_UP:])


def _median(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_WARM_UP + _REPEATS):
        dist.barrier()
        begun_s = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun_s)
    return statistics.median(seconds[_WARM_UP:])
