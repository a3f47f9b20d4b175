"""The bench: layouts and prices of what a ground is made of, each worked out once."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.cost.calibration import Calibration
from toolkit.hardware import Cluster
from toolkit.plan.search import linears
from toolkit.plan.search.choice import Cost, Weights
from toolkit.plan.search.constraints import Constraints
from toolkit.plan.search.estimate import Estimator
from toolkit.plan.search.layouts import AxisName
from toolkit.plan.search.local import Part
from toolkit.plan.search.rows import Rows
from toolkit.plan.search.site import Mesh, Site, inner_axes
from toolkit.plan.search.space import Ground
from toolkit.plan.search.stack import Layouts, Outline, Stack
from toolkit.plan.subject import Subject

# How operators are split over the inner axes.
WHOLE, MEGATRON, TOKENS = "operators whole", "columns and rows", "columns, rows and tokens"
HEADS, REGIONS = "heads and features", "heads, features and vocabulary"
SEARCHED, LEAN = "operators split by search", "operators split lean"


def by_program(split: str, mesh: Mesh) -> bool:
    """Return whether the own executor runs this (lower/ladder.py): operators split one by one, or
    stages that several ranks split.
    """
    return split in (SEARCHED, LEAN, HEADS, REGIONS) or (mesh.inner > 1 and mesh.pipeline > 1)


class Bench:
    """Works for one subject, cluster, and number of ranks; `like` shares what another has done on
    a cluster where all takes as long.
    """

    def __init__(
        self,
        subject: Subject,
        cluster: Cluster,
        num_ranks: int,
        constraints: Constraints,
        calibration: Calibration | None,
        *,
        outline: Outline | None = None,
        like: Bench | None = None,
    ) -> None:
        self.subject = subject
        self.cluster = cluster
        self.num_ranks = num_ranks
        self.constraints = constraints
        self.calibration = calibration
        self.outline = outline or Outline(subject, cluster)
        self._stacks: dict[object, Stack] = like._stacks if like else {}
        self._rows: dict[object, Rows] = like._rows if like else {}
        self._priced: dict[object, Part] = like._priced if like else {}
        self._given: dict[Stack, dict[str, Layouts]] = like._given if like else {}
        self._heads: dict[Stack, Layouts | None] = {}
        self._shared = _shared(self.outline)
        self._whole = self._representatives(constraints.whole_ops(subject.graph))
        self._crossing_names: list[list[str]] = []

    def base_rows(self, num_samples: int) -> Rows:
        """What whole operators take, on the fastest device."""
        key = ("base", num_samples)
        if key not in self._rows:
            stack = Stack(
                self.outline, self.cluster, (), num_samples,
                calibration=self.calibration, priced=self._priced,
            )  # fmt: skip
            layouts = stack.fastest(Weights())
            devices = {group.node.device.name: group.node.device for group in self.cluster.groups}
            fastest = max(devices.values(), key=lambda one: one.peak(self.subject.dtype))
            self._rows[key] = self.as_rows(stack.costs(layouts, fastest))
        return self._rows[key]

    def as_rows(self, costs: Sequence[Cost]) -> Rows:
        blocks = [item.path is not None for item in self.outline.items]
        return Rows.of(costs, blocks, self._shared)

    def stack(self, ground: Ground, first: int = 0) -> Stack:
        mesh = ground.mesh
        axes = inner_axes(self.cluster, self.num_ranks, mesh, first)
        key = (ground.num_samples, axes, self.cluster.device(first).name)
        if key not in self._stacks:
            self._stacks[key] = Stack(
                self.outline, self.cluster, axes, ground.num_samples,
                calibration=self.calibration, may_split=self._may_split, first=first,
                priced=self._priced,
            )  # fmt: skip
        return self._stacks[key]

    def linears(self, stack: Stack) -> dict[str, Layouts]:
        """Columns and rows of Linears, without and with tokens split between them, where
        transform.py and sequence.py find that they can be.
        """
        if [axis.name for axis in stack.axes] != ["tensor"] or self._whole:
            return {}
        if stack not in self._given:
            wanted = self.constraints.splits or ("columns", "searched")
            found = {}
            # Placements say how a module is split that runs once.
            if "columns" in wanted and self.outline.num_passes == 1:
                found[MEGATRON] = linears.columns_and_rows(stack)
                found[TOKENS] = linears.tokens(stack)
            if "heads" in wanted:
                found[HEADS] = linears.heads(stack)
            if "regions" in wanted:
                found[REGIONS] = linears.heads_and_vocabulary(stack)
            self._given[stack] = {
                split: stack.given(dims) for split, dims in found.items() if dims is not None
            }
        return self._given[stack]

    def heads(self, stack: Stack) -> Layouts | None:
        """Operators whole, or all heads and features split over the tensor axis; None where the
        degree does not divide them.
        """
        if not stack.axes:
            return stack.fastest(Weights())
        if stack not in self._heads:
            dims = linears.heads(stack)
            self._heads[stack] = None if dims is None else stack.given(dims)
        return self._heads[stack]

    def estimator(self, site: Site, stack: Stack, layouts: Layouts, ground: Ground) -> Estimator:
        rows = []
        for kind in range(len(site.kinds)):
            first = site.costs.ranks[site.positions(kind)[0]]
            here = stack if first == 0 else self.stack(ground, first)
            key = (id(layouts), id(here), site.kinds[kind].device.name)
            if key not in self._rows:
                found = here.costs(layouts, site.kinds[kind].device)
                self._rows[key] = self.as_rows(found)
            rows.append(self._rows[key])
        return Estimator(site, rows, self._borders(stack, layouts), self.outline.num_passes)

    def _borders(self, stack: Stack, layouts: Layouts) -> list[list[int]]:
        """Bytes of each tensor that crosses a cut before each item, as one rank sends them."""
        size = stack.sizes(layouts)
        return [[size[name] for name in names] for names in self._crossing(stack)]

    def _crossing(self, stack: Stack) -> list[list[str]]:
        """The tensors that cross a cut before each item (chain.crossing, for all cuts at once)."""
        if self._crossing_names:
            return self._crossing_names
        graph, items = stack.graph, self.outline.items
        learned = self.outline.learned
        item_of = {
            op.name: index
            for index, item in enumerate(items)
            for op in graph.ops[item.begin : item.end]
        }
        found: list[list[str]] = [[] for _ in range(len(items) + 1)]
        for op in graph.ops:
            for name in op.outputs if op.name in item_of else ():
                readers = graph.consumers[name]
                last = max((item_of[reader.name] for reader in readers), default=-1)
                last = len(items) - 1 if name in graph.outputs else last
                if name in learned:
                    for index in range(item_of[op.name] + 1, last + 1):
                        found[index].append(name)
        self._crossing_names = found
        return found

    def _may_split(self, op: str, _dim: str, _axis: AxisName) -> bool:
        return op not in self._whole

    def _representatives(self, names: frozenset[str]) -> frozenset[str]:
        """The operators that stand for those named, whichever copy of a block they are in."""
        found = set()
        graph = self.subject.graph
        for item in self.outline.segments:
            first = self.outline.segments[self.outline.representatives[item.kind]].begin
            for place, op in enumerate(graph.ops[item.begin : item.end]):
                if op.name in names:
                    found.add(graph.ops[first + place].name)
        return frozenset(found)


def _shared(outline: Outline) -> tuple[str, ...]:
    """Parameters that several items read."""
    graph = outline.subject.graph
    readers: dict[str, set[int]] = {}
    for index, item in enumerate(outline.items):
        for op in graph.ops[item.begin : item.end]:
            for name in op.inputs:
                if graph.tensors[name].role == "parameter":
                    readers.setdefault(name, set()).add(index)
    return tuple(name for name, items in readers.items() if len(items) > 1)
