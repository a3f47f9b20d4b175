"""Who waits for whom: dependencies from masks that overlap, and the exchanges that serve them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import networkx as nx

from toolkit.hardware.cluster import Cluster
from toolkit.plan.materialize import Adapter, materialize
from toolkit.plan.tensors import Box, Mask, PTensor, VTensor, missing

if TYPE_CHECKING:
    from toolkit.plan.program.frozen import SubOp

View = tuple[str, int]  # a sub-operator, and which of its inputs or outputs


def producers(sub_ops: Sequence[SubOp]) -> dict[str, dict[View, VTensor]]:
    """Tensor name -> the views that make it."""
    found: dict[str, dict[View, VTensor]] = {}
    for sub_op in sub_ops:
        for index, view in enumerate(sub_op.outputs):
            found.setdefault(view.tensor.name, {})[sub_op.name, index] = view
    return found


def suppliers(view: VTensor, made: Mapping[View, VTensor]) -> list[View]:
    """Return which of the views that make a tensor a consumer's view is rebuilt from.

    That is all whose masks overlap it, or only those on its own device where they suffice. Partial
    sums that are read have to be taken of one family by all readers: from everywhere.
    """
    box = Mask(view.mask.box)
    near = {key: one for key, one in made.items() if one.mask & box}
    local = [key for key, one in near.items() if one.rank == view.rank]
    if local and view.mask.chunk.is_whole and not gaps(view, [near[key].mask for key in local]):
        return local
    return list(near)


def gaps(view: VTensor, masks: Sequence[Mask]) -> tuple[Box, ...]:
    """Return the boxes of a view's tensor, inside the view, that masks do not add up to."""
    box = Mask(view.mask.box)
    inside = [both for mask in masks if (both := mask & box)]
    shifted = [Mask(mask.within(box), mask.chunk) for mask in inside]
    found = missing(PTensor("view", box.shape, view.tensor.dtype), shifted)
    return tuple(box.at(Mask(gap)).box for gap in found)


def dependencies(sub_ops: Sequence[SubOp], order: Sequence[tuple[str, str]]) -> nx.DiGraph:
    """Return the graph of who runs before whom; an edge's `why` says what for."""
    made = nx.DiGraph()
    made.add_nodes_from(sub_op.name for sub_op in sub_ops)
    makers = producers(sub_ops)
    for sub_op in sub_ops:
        for view in dict.fromkeys(sub_op.inputs):
            for name, _ in suppliers(view, makers.get(view.tensor.name, {})):
                before = made.get_edge_data(name, sub_op.name, {"why": ()})["why"]
                why = tuple(dict.fromkeys((*before, view.tensor.name)))
                made.add_edge(name, sub_op.name, why=why)
    for first, second in order:
        if not made.has_edge(first, second):
            made.add_edge(first, second, why=("order",))
    return made


@dataclass(frozen=True)
class Exchange:
    """Views of one tensor that have to do with each other: who makes, and who reads.

    `sources[i]` makes `producers[i]`; `readers[i]` are all inputs that are `consumers[i]`. `box` is
    the part of the tensor that this is about.
    """

    tensor: PTensor
    box: Box
    producers: tuple[VTensor, ...]
    sources: tuple[View, ...]
    consumers: tuple[VTensor, ...]
    readers: tuple[tuple[View, ...], ...]

    @property
    def crosses(self) -> bool:
        """Whether more than one device takes part."""
        return len({view.rank for view in (*self.producers, *self.consumers)}) > 1

    def adapter(self, cluster: Cluster) -> Adapter:
        """Return the steps, on a tensor that is only the part this is about; times predicted."""
        whole = Mask(self.box)
        inside = whole if whole != Mask.whole(self.tensor.shape) else ""
        tensor = PTensor(f"{self.tensor.name}{inside}", whole.shape, self.tensor.dtype)

        def shifted(view: VTensor) -> VTensor:
            mask = Mask(view.mask.within(whole), view.mask.chunk)
            return replace(view, tensor=tensor, mask=mask)

        # Coverage was checked for every consumer; what nobody reads may be missing.
        return materialize(
            tensor,
            [shifted(view) for view in self.producers],
            [shifted(view) for view in self.consumers],
            cluster,
            absent="zero",
        )


def exchanges(sub_ops: Sequence[SubOp], waits: nx.DiGraph) -> tuple[Exchange, ...]:
    """Return the exchanges in an order in which they can run.

    Views that depend on each other, directly or through others, form one; where that would make a
    cycle (a part must be read before another is made), each consumer is served by itself.
    """
    makers = producers(sub_ops)
    found: list[Exchange] = []
    for name, readers in _readers(sub_ops, makers).items():
        found += _together(makers[name], readers)
    while True:
        graph = _with(found, waits)
        try:
            order = nx.lexicographical_topological_sort(graph, key=_place(sub_ops))
            return tuple(found[node] for node in order if isinstance(node, int))
        except nx.NetworkXUnfeasible:
            cycle = {node for edge in nx.find_cycle(graph) for node in edge}
        stuck = [node for node in cycle if isinstance(node, int) and len(found[node].readers) > 1]
        assert stuck, "dependencies themselves have a cycle"
        apart = [one for index in stuck for one in _apart(found[index])]
        found = [one for index, one in enumerate(found) if index not in stuck] + apart


def in_order(
    sub_ops: Sequence[SubOp], waits: nx.DiGraph, found: Sequence[Exchange]
) -> tuple[SubOp, ...]:
    """Return sub-operators so that each comes after what it waits for, else as they were given.

    All that an exchange moves is made before any of it is read.
    """
    by_name = {sub_op.name: sub_op for sub_op in sub_ops}
    order = nx.lexicographical_topological_sort(_with(found, waits), key=_place(sub_ops))
    return tuple(by_name[node] for node in order if isinstance(node, str))


def _with(found: Sequence[Exchange], waits: nx.DiGraph) -> nx.DiGraph:
    """The dependencies with a node (its place) for each exchange."""
    graph = waits.copy()
    for index, one in enumerate(found):
        graph.add_edges_from((sub_op, index) for sub_op, _ in one.sources)
        graph.add_edges_from((index, sub_op) for some in one.readers for sub_op, _ in some)
    return graph


def _place(sub_ops: Sequence[SubOp]) -> Callable[[str | int], int]:
    """Sort key of nodes: sub-operators (names) as given, exchanges (numbers) as soon as can be."""
    places = {sub_op.name: place for place, sub_op in enumerate(sub_ops)}
    return lambda node: places[node] if isinstance(node, str) else -1


def _readers(
    sub_ops: Sequence[SubOp], makers: Mapping[str, Mapping[View, VTensor]]
) -> dict[str, dict[VTensor, list[View]]]:
    """Tensor name -> what is read of it on which device -> the inputs it is."""
    found: dict[str, dict[VTensor, list[View]]] = {}
    for sub_op in sub_ops:
        for index, view in enumerate(sub_op.inputs):
            if view.tensor.name in makers:
                same = replace(view, op="")
                readers = found.setdefault(view.tensor.name, {})
                readers.setdefault(same, []).append((sub_op.name, index))
    return found


def _together(
    made: Mapping[View, VTensor], readers: Mapping[VTensor, Sequence[View]]
) -> list[Exchange]:
    """Exchanges of the views that depend on each other."""
    links = nx.Graph()
    for view in readers:
        links.add_edges_from((key, view) for key in suppliers(view, made))
    found = []
    for component in nx.connected_components(links):
        sources = [key for key in made if key in component]
        found.append(exchange(made, sources, {v: readers[v] for v in readers if v in component}))
    return found


def _apart(shared: Exchange) -> list[Exchange]:
    """One exchange for each thing that is read."""
    made = dict(zip(shared.sources, shared.producers, strict=True))
    return [
        exchange(made, suppliers(view, made), {view: inputs})
        for view, inputs in zip(shared.consumers, shared.readers, strict=True)
    ]


def exchange(
    made: Mapping[View, VTensor],
    sources: Sequence[View],
    readers: Mapping[VTensor, Sequence[View]],
) -> Exchange:
    """Return the exchange of some of what is `made` and the views that are read of it."""
    views = [*(made[key] for key in sources), *readers]
    box = tuple(
        (min(low for low, _ in spans), max(high for _, high in spans))
        for spans in zip(*(view.mask.box for view in views), strict=True)
    )
    return Exchange(
        views[0].tensor,
        box,
        tuple(made[key] for key in sources),
        tuple(sources),
        tuple(readers),
        tuple(tuple(inputs) for inputs in readers.values()),
    )
