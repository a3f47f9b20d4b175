"""What one rank sees of the model: the shapes of its share, and the calls that sharing makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from toolkit.ir.graph import Op, OpGraph
from toolkit.plan import chain, sequence, transform
from toolkit.plan.plan import Plan
from toolkit.plan.predict.costs import SPLIT_LINEAR, Call, Costs
from toolkit.plan.predict.passes import OpCalls
from toolkit.plan.predict.units import padded_rows
from toolkit.plan.transform import Region


def split(plan: Plan, graph: OpGraph, costs: Costs) -> tuple[OpGraph, OpCalls]:
    """Return the graph of one rank's shapes, and the calls around its operators.

    `graph` is the model at one rank's microbatch, whole.
    """
    degree = plan.size("tensor")
    if degree == 1:
        return graph, OpCalls()
    regions = transform.regions(graph, chain.segments(graph), degree)
    ranks = costs.group(("tensor",), 0)
    if plan.placed("sequence"):
        runs = sequence.runs(graph, regions, degree)
        whole = transform.local(graph, regions, degree)
        shares = sequence.local(whole, runs, degree)
        return shares, replace(_by_tokens(plan, graph, runs, costs, ranks), whole=whole)

    def reduced(name: str, region: Region, way: str = "") -> tuple[Call, ...]:
        call = costs.call("all_reduce", graph.tensors[name].num_bytes, ranks)
        return (_dispatched(call, region, costs, way),)

    after = {
        graph.producer[region.output].name: reduced(region.output, region) for region in regions
    }
    back = {
        region.columns_op: reduced(region.input, region, " backward")
        for region in regions
        if graph.tensors[region.input].requires_grad
    }
    again = {graph.producer[region.output].name for region in regions if region.repeated}
    calls = OpCalls(after=after, after_backward=back, again=frozenset(again))
    return transform.local(graph, regions, degree), calls


def _dispatched(call: Call, region: Region | None, costs: Costs, way: str = "") -> Call:
    """The call, with what it takes to run a region's Linears as DTensors."""
    if region is None:
        return call
    added_s = (len(region.columns) + 1) * costs.added_s(f"{SPLIT_LINEAR}{way}")
    return replace(call, seconds=call.seconds + added_s)


def _by_tokens(
    plan: Plan,
    graph: OpGraph,
    runs: Sequence[sequence.Run],
    costs: Costs,
    ranks: Sequence[int],
) -> OpCalls:
    """The calls of activations split by tokens; see plan/sequence.py."""

    def call(kind: str, name: str) -> tuple[Call, ...]:
        return (costs.call(kind, graph.tensors[name].num_bytes, ranks),)

    before, after, before_backward, after_backward, again = {}, {}, {}, {}, set()
    gathered: set[str] = set()
    for run in runs:
        after[graph.producer[run.output].name] = call("all_gather", run.output)
        if graph.tensors[run.input].requires_grad:
            first = next(op for op in graph.ops if _reads(op, run.input, run.blocks[0]))
            after_backward[first.name] = call("all_gather", run.input)
        for inner in run.inside:
            readers = [op for op in graph.ops if _reads(op, inner.input, inner.module)]
            first = readers[0]
            gathered.update(op.name for op in readers)
            last = graph.producer[inner.output].name
            (gather,) = call("all_gather", inner.input)
            (gather_back,) = call("all_gather", inner.output)
            before[first.name] = (_dispatched(gather, inner.region, costs),)
            before_backward[last] = (_dispatched(gather_back, inner.region, costs, " backward"),)
            if inner.region:
                after[last] = call("reduce_scatter", inner.output)
                if inner.region.repeated:
                    again.add(last)
                if graph.tensors[inner.input].requires_grad:
                    after_backward[first.name] = call("reduce_scatter", inner.input)
    return OpCalls(
        before=before,
        after=after,
        before_backward=before_backward,
        after_backward=after_backward,
        again=frozenset(again),
        gathered=frozenset(gathered),
        alone=frozenset(path for run in runs for path in (run.blocks[0], run.blocks[-1])),
        at_end=tuple(
            costs.call("all_reduce", size, ranks) for size in _partial_bytes(plan, runs).values()
        ),
    )


def _reads(op: Op, name: str, module: str) -> bool:
    within = op.module_path == module or op.module_path.startswith(f"{module}.")
    return within and name in op.inputs


def _partial_bytes(plan: Plan, runs: Sequence[sequence.Run]) -> Counter[str]:
    """Bytes of gradients that are partial sums over tensor, by dtype; of one rank's shards where
    they are sharded.
    """
    size = plan.size("data") if plan.placed("shard") else 1
    found: Counter[str] = Counter()
    for run in runs:
        for tensor in run.partial:
            found[tensor.dtype] += padded_rows(tensor, size) // size
    return found
