"""Which candidates use the host's memory: where nothing fits a device without, or constraints ask.

Copies and an update on the host are never faster than none, so only what does not fit is moved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from toolkit.hardware import Cluster
from toolkit.plan.plan import OFFLOADS, How, Offload
from toolkit.plan.search.arrange import held_factor
from toolkit.plan.search.constraints import Constraints
from toolkit.plan.search.estimate import Estimator


class Keep(NamedTuple):
    """How parameters lie over the data axis, and what of them and their states is on the host."""

    way: How
    offload: Offload

    def factor(self, num_data: int) -> float:
        """Return the bytes a device holds for a byte of parameters."""
        return held_factor(self.way, num_data, self.offload)


@dataclass(frozen=True)
class Hosted:
    """The uses of the host that are tried `first`, and `then` where none of those fits."""

    first: tuple[Offload, ...]
    then: tuple[Offload, ...]

    @staticmethod
    def of(constraints: Constraints, cluster: Cluster, num_ranks: int) -> Hosted:
        """Return what constraints allow, where the machines have hosts beside their devices."""
        allowed = tuple(one for one in OFFLOADS if one in (constraints.offload or OFFLOADS))
        if "none" not in allowed:
            return Hosted(allowed, ())
        places = (cluster.place(rank) for rank in range(num_ranks))
        apart = all(place.node.host is not None for place in places)
        return Hosted(("none",), allowed[1:] if apart else ())

    def keeps(self, ways: Sequence[How], *, natively: bool) -> tuple[list[Keep], list[Keep]]:
        """Return the combinations that a rung runs, to try first and then; shards come up from a
        host `natively` alone.
        """
        first, then = (
            [
                Keep(way, offload)
                for offload in offloads
                for way in ways
                if offload != "parameters" or (natively and way == "shard")
            ]
            for offloads in (self.first, self.then)
        )
        return first, then


def least(kept: Sequence[Keep], num_data: int) -> float:
    """Return the fewest bytes a device holds for one of parameters; infinity without a choice."""
    return min((keep.factor(num_data) for keep in kept), default=math.inf)


def worth(
    kept: Sequence[Keep], estimator: Estimator, bound_s: float, best_s: float
) -> Iterator[Keep]:
    """Yield those whose update on the host, after at least `bound_s` of computing, is not slower
    than the best.
    """
    site = estimator.site
    held = float(estimator.rows[0].held.sum()) / site.mesh.pipeline
    for keep in kept:
        share = held if keep.way == "replicate" else held / site.mesh.data
        if bound_s + site.update_s(share, 0, keep.offload) <= best_s:
            yield keep
