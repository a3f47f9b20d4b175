"""The outer space: meshes and microbatches, with bounds that no plan on them can beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from toolkit.hardware import Cluster
from toolkit.plan.search.constraints import Constraints
from toolkit.plan.search.site import Mesh

# Unless constraints say otherwise: operators are split inside a machine; samples of a microbatch.
_MOST_CONTEXT = 4
MOST_SAMPLES = 64


class Ground(NamedTuple):
    """A mesh, and how its share of the batch is cut: samples of a microbatch, and how many."""

    mesh: Mesh
    num_samples: int
    microbatches: int


@dataclass(frozen=True)
class Space:
    """All grounds for a batch on `num_ranks` devices."""

    cluster: Cluster
    num_ranks: int
    batch: int
    num_blocks: int
    constraints: Constraints
    most_context: int = _MOST_CONTEXT

    def meshes(self) -> Iterator[Mesh]:
        """Yield the factorisations of the ranks that the constraints allow, data in one group."""
        allows = self.constraints.allows
        nodes = self.cluster.by_node(range(self.num_ranks))
        per_node = min(len(places) for places in nodes.values())
        given = self.constraints
        most_tensor = per_node if given.tensor is None and given.max_tensor is None else 2**31
        most_context = (
            self.most_context if given.context is None and given.max_context is None else 2**31
        )
        for tensor in divisors(self.num_ranks):
            for context in divisors(self.num_ranks // tensor):
                if tensor > most_tensor or context > most_context:
                    continue
                rest = self.num_ranks // tensor // context
                for pipeline in divisors(rest):
                    mesh = Mesh(pipeline, 1, rest // pipeline, context, tensor)
                    named = mesh._asdict()
                    del named["replica"]
                    if (
                        pipeline <= self.num_blocks
                        and all(allows(*pair) for pair in named.items())
                        and self.replicas(mesh)
                    ):
                        yield mesh

    def replicas(self, mesh: Mesh) -> list[int]:
        """Return into how many groups the data axis of a mesh may be cut, parameters sharded
        inside each (hybrid sharding): unless constraints say which, none or the machines it spans.
        """
        given = self.constraints.replica
        if given is None:
            machines = self._machines(mesh)
            return [1, machines] if machines > 1 else [1]
        sizes = [given] if isinstance(given, int) else given
        return [n for n in sizes if mesh.data % n == 0 and (n == 1 or n < mesh.data)]

    def _machines(self, mesh: Mesh) -> int:
        """Over how many machines a data axis lies evenly, several of its ranks on each; else 1."""
        ranks = range(0, mesh.data * mesh.inner, mesh.inner)
        counts = [len(places) for places in self.cluster.by_node(ranks).values()]
        return len(counts) if counts[0] > 1 and len(set(counts)) == 1 else 1

    def grounds(self) -> Iterator[Ground]:
        """Yield meshes with the ways to cut the batch that divide evenly."""
        for mesh in self.meshes():
            if self.batch % mesh.data:
                continue
            share = self.batch // mesh.data
            for num_samples in divisors(share):
                count = share // num_samples
                if (
                    (num_samples <= MOST_SAMPLES or self.constraints.microbatch_size is not None)
                    and self.constraints.allows("microbatch_size", num_samples)
                    and self.constraints.allows("microbatches", count)
                ):
                    yield Ground(mesh, num_samples, count)

    def why_empty(self) -> str:
        """Return which rule leaves nothing, for a message."""
        meshes = list(self.meshes())
        if not meshes:
            return (
                f"no mesh of {self.num_ranks} devices has the sizes asked for "
                f"(pipelines of at most {self.num_blocks} blocks)"
            )
        if all(self.batch % mesh.data for mesh in meshes):
            sizes = sorted({mesh.data for mesh in meshes})
            return f"batch {self.batch} does not divide over data axes of {_some(sizes)}"
        return f"no number of microbatches allowed divides batch {self.batch}"


def divisors(number: int) -> list[int]:
    """Return the divisors in ascending order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]


def _some(sizes: Sequence[int]) -> str:
    shown = ", ".join(map(str, sizes[:6]))
    return f"{shown}, ..." if len(sizes) > 6 else shown
