"""Stages of one candidate: how long ranges of items take, and whether they fit, as matrices that
the cut is found in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from toolkit.plan.plan import How, Offload
from toolkit.plan.search import schedules
from toolkit.plan.search.estimate import Estimator, Stretch
from toolkit.plan.search.inter_op import cut
from toolkit.plan.search.rows import Rows, between, prefix

Recompute = Literal["none", "needed", "all"]


@dataclass(frozen=True)
class Arrangement:
    """The items of each stage, and where along the pipeline it runs."""

    stretches: tuple[Stretch, ...]
    positions: tuple[int, ...]


@dataclass
class Arranger:
    """Cuts the chain for one estimator. `starts` are the items a stage may begin with; `equal`
    stages have as many blocks each.
    """

    estimator: Estimator
    starts: Sequence[int]
    equal: bool = False
    _memory_seen: dict[object, Any] = field(default_factory=dict, repr=False)

    def arrange(
        self,
        *,
        family: str,
        microbatches: int,
        parameters: How,
        recompute: Recompute,
        limit: float,
        offload: Offload = "none",
    ) -> Arrangement | None:
        """Return the best stages whose devices hold at most `limit` bytes, or None."""
        site = self.estimator.site
        num = site.mesh.pipeline
        chunks = schedules.num_chunks(family) if num > 1 else 1
        if chunks > 1 and len(site.kinds) > 1:
            return None
        alive = schedules.alive(family, num, microbatches)
        places = schedules.placement(family, num) if num > 1 else (0,)
        num_items = self.estimator.rows[0].num_items
        nodes = np.array([*self.starts, num_items])
        again: dict[tuple[int, int], Any] = {}
        seen: dict[object, tuple[Any, Any]] = {}

        def times(stage: int, kind: int) -> Any:
            most = alive[places[stage]].most(stage)
            room = min(limit, site.kinds[kind].memory_bytes) / chunks
            key = (most, kind)
            if key not in seen:
                found, until = self._matrix(
                    kind, most, microbatches, (parameters, offload), recompute, room, num
                )
                found = found[np.ix_(nodes, nodes)]
                if self.equal:
                    found = np.where(self._as_many(nodes, num * chunks), found, np.inf)
                seen[key] = found, until
            again[stage, kind] = seen[key][1]
            return seen[key][0]

        counts = [len(site.positions(kind)) * chunks for kind in range(len(site.kinds))]
        found = cut(times, len(self.starts), counts, microbatches)
        if found is None:
            return None
        ends = found.ends(len(self.starts))
        stretches = []
        for stage, (first, last, kind) in enumerate(
            zip(found.begins, ends, found.classes, strict=True)
        ):
            begin, end = int(nodes[first]), int(nodes[last])
            stretches.append(Stretch(begin, end, int(again[stage, kind][begin, end])))
        if chunks > 1 or num == 1:
            return Arrangement(tuple(stretches), places)
        free = {kind: list(site.positions(kind)) for kind in range(len(site.kinds))}
        positions = tuple(free[kind].pop(0) for kind in found.classes)
        return Arrangement(tuple(stretches), positions)

    def _as_many(self, nodes: Any, num_stages: int) -> Any:
        """Whether the items between two nodes have a stage's share of the blocks."""
        blocks = prefix(self.estimator.rows[0].is_block)[nodes]
        return (blocks[None, :] - blocks[:, None]) * num_stages == blocks[-1]

    def _matrix(
        self,
        kind: int,
        most: tuple[int, int],
        microbatches: int,
        kept: tuple[How, Offload],
        recompute: Recompute,
        room: float,
        num_stages: int,
    ) -> tuple[Any, Any]:
        """(seconds, up to where blocks are recomputed) of the items [i, j) on a class of devices;
        infinity where they do not fit in `room` bytes. `most` microbatches are alive, and wait for
        the gradients of weights.
        """
        alive, waiting = most
        rows = self.estimator.rows[kind]
        size = rows.num_items + 1
        begins, ends = np.indices((size, size))
        fixed = self._fixed(kind, kept, microbatches, num_stages)
        spare = room - fixed - (waiting * rows.oweds if waiting else 0.0)
        if recompute == "all":
            until = ends
        elif recompute == "none":
            until = begins
        else:
            with np.errstate(invalid="ignore"):
                over = np.nan_to_num(alive * rows.saveds - spare, posinf=0.0, neginf=0.0)
            frees = np.where(over > 0, (over + rows.gain.max(initial=0.0)) / max(alive, 1), 0.0)
            until = np.minimum(rows.again_range(begins, frees), size)
        inside = np.minimum(until, ends)
        gained = rows.gains[inside] - rows.gains[begins]
        back = np.where(inside > begins, rows.gain.max(initial=0.0), 0.0)
        with np.errstate(invalid="ignore"):
            fits = alive * (rows.saveds - gained) + back <= spare
        seconds = self._seconds(kind, kept[0]) + rows.agains[inside] - rows.agains[begins]
        return np.where((until <= ends) & fits & (ends > begins), seconds, np.inf), inside

    def _seconds(self, kind: int, parameters: How) -> Any:
        """Forward and backward of a range, where gathers and reductions take longer than that."""
        key = ("seconds", kind, parameters)
        if key not in self._memory_seen:
            rows = self.estimator.rows[kind]
            found = rows.seconds
            if self.estimator.site.mesh.data > 1 and parameters in ("shard", "shard_gradients"):
                moved = self._moved(kind, parameters)
                forward, backward = between(rows.forward), between(rows.backward)
                found = np.maximum(backward, between(moved))
                found = found + (
                    np.maximum(forward, between(moved)) if parameters == "shard" else forward
                )
            self._memory_seen[key] = found
        return self._memory_seen[key]

    def _moved(self, kind: int, parameters: How) -> Any:
        """Seconds that each item's parameters take along the data axis in one pass."""
        site, rows = self.estimator.site, self.estimator.rows[kind]
        position = site.positions(kind)[0]
        what = "all_gather" if parameters == "shard" else "reduce_scatter"
        return np.array(
            [
                site.data_s(what, sum(part.num_bytes for part in parts), position)
                if block and parts
                else 0.0
                for parts, block in zip(rows.parts, rows.is_block, strict=True)
            ]
        )

    def _fixed(
        self, kind: int, kept: tuple[How, Offload], microbatches: int, num_stages: int
    ) -> Any:
        """Bytes of a range that do not depend on how many microbatches are alive."""
        key = ("fixed", kind, kept, microbatches, num_stages)
        if key not in self._memory_seen:
            rows, mesh = self.estimator.rows[kind], self.estimator.site.mesh
            factor = held_factor(kept[0], mesh.data, kept[1])
            found = rows.temporaries + (rows.parameters * factor if factor else 0.0)
            if kept[0] == "shard" and mesh.data > 1:
                found = found + self._gathered(rows)
            if num_stages > 1 and self.estimator.num_passes == 1:
                border = np.array([float(sum(sizes)) for sizes in self.estimator.borders])
                found = found + microbatches * (border[:, None] + border[None, :])
            self._memory_seen[key] = found
        return self._memory_seen[key]

    def _gathered(self, rows: Rows) -> Any:
        """Two whole blocks, and all that is in no block."""
        blocks = rows.held[rows.is_block]
        return 2 * blocks.max(initial=0.0) + between(np.where(rows.is_block, 0.0, rows.held))


def held_factor(parameters: How, num_data: int, offload: Offload = "none") -> float:
    """Return the bytes a device holds of parameters, gradients and both moments for a byte of
    parameters, beside a host of its own.

    >>> held_factor("replicate", 8), held_factor("shard", 8), held_factor("shard_optimizer", 8)
    (4.0, 0.5, 2.375)
    >>> held_factor("replicate", 8, "optimizer"), held_factor("shard", 8, "parameters")
    (2.0, 0.0)
    """
    part = 1 / num_data
    if offload == "parameters":
        return 0.0
    moments = 2.0 if parameters == "replicate" else 2 * part
    return (-moments if offload == "optimizer" else 0.0) + {
        "replicate": 4.0,
        "shard_optimizer": 2 + 3 * part,
        "shard_gradients": 1 + 3 * part,
        "shard": 4 * part,
    }[parameters]
