"""Paths between all placements on small meshes, against those of torch's own planner."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest

from toolkit.hardware import find_cluster
from toolkit.plan.rvd import search
from toolkit.plan.rvd.layouts import Placed
from toolkit.plan.rvd.moves import kind
from toolkit.plan.rvd.prices import AlphaBeta


@dataclass(frozen=True)
class Calls:
    """One for every communication, nothing for local moves."""

    local_is_free: bool = True

    def collective(self, kind, num_bytes, groups):
        return float(kind not in ("slice", "vslice", "pad"))

    def messages(self, messages):
        return 1.0

    def topology(self, ranks):
        return len(ranks)


@pytest.fixture(scope="module")
def meshes():
    """A 2x2 and a 2x4 mesh of one process: torch's fake group has no peers to talk to."""
    import torch.distributed as dist

    try:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        pytest.skip(f"this torch has no fake process group: {error}")
    if dist.is_initialized():
        pytest.skip("a process group is in use")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    import torch

    yield {
        (2, 2): DeviceMesh("cpu", torch.arange(4).reshape(2, 2)),
        (2, 4): DeviceMesh("cpu", torch.arange(8).reshape(2, 4)),
    }
    dist.destroy_process_group()


@pytest.mark.parametrize("axes", [(2, 2), (2, 4)])
def test_no_more_calls_than_torch_and_never_dearer(meshes, axes):
    """All pairs of placements of a 2-D tensor on a mesh, by DTensor's graph search and by ours."""
    import torch
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor._redistribute import DTensorRedistributePlanner
    from torch.distributed.tensor.placement_types import Partial, Replicate, Shard

    shape = (64, 64)
    meta = TensorMeta(torch.Size(shape), (64, 1), torch.float32)
    ranks = tuple(range(math.prod(axes)))
    prices = AlphaBeta(find_cluster("h100x8"))
    price = search.Pricer(prices, ranks, axes, shape, 4)
    places = {0: Replicate(), 1: Partial(), 2: Shard(0), 3: Shard(1)}

    def ours(slots):
        rows = [tuple(axis for axis in (0, 1) if slots[axis] == place) for place in range(4)]
        return Placed(axes, tuple(rows))

    every = list(itertools.product(range(4), repeat=2))
    fewer = 0
    for old, new in itertools.product(every, every):
        planner = DTensorRedistributePlanner(meshes[axes], meta)
        specs = [
            DTensorSpec(meshes[axes], tuple(places[s] for s in slots), tensor_meta=meta)
            for slots in (old, new)
        ]
        found = planner.generate_graph_based_transform_infos(*specs, shape)
        state, calls, cost = list(old), 0, 0.0
        for info in found:
            target = next(s for s, p in places.items() if p == info.src_dst_placements[1])
            what = kind(state[info.mesh_dim], target)
            cost += price(what, (info.mesh_dim,), ours(state).slots)
            calls += what not in ("slice", "vslice", "pad")
            state[info.mesh_dim] = target
        ends = ours(old), ours(new)
        fewest = search.find(shape, 4, ranks, *ends, Calls())
        assert fewest.cost <= calls, (old, new)
        fewer += fewest.cost < calls
        cheapest = search.find(shape, 4, ranks, *ends, prices)
        assert cheapest.cost <= cost * (1 + 1e-9), (old, new, str(cheapest))
    # Both ends of nested partial sums, at least: torch reduces axis by axis.
    assert fewer > 0
