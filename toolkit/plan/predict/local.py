"""What one rank sees of the model: the shapes of its share, and the calls that sharing makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from toolkit.ir.graph import Op, OpGraph
from toolkit.plan import chain, sequence, transform
from toolkit.plan.plan import Plan
from toolkit.plan.predict.costs import Call, Costs
from toolkit.plan.predict.passes import OpCalls
from toolkit.plan.predict.units import padded_rows


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
        shares = sequence.local(transform.local(graph, regions, degree), runs, degree)
        return shares, _by_tokens(plan, graph, runs, costs, ranks)

    def reduced(name: str) -> tuple[Call, ...]:
        return (costs.call("all_reduce", graph.tensors[name].num_bytes, ranks),)

    after = {graph.producer[region.output].name: reduced(region.output) for region in regions}
    back = {
        region.columns_op: reduced(region.input)
        for region in regions
        if graph.tensors[region.input].requires_grad
    }
    again = {graph.producer[region.output].name for region in regions if region.repeated}
    calls = OpCalls(after=after, after_backward=back, again=frozenset(again))
    return transform.local(graph, regions, degree), calls


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
    for run in runs:
        after[graph.producer[run.output].name] = call("all_gather", run.output)
        if graph.tensors[run.input].requires_grad:
            first = next(op for op in graph.ops if _reads(op, run.input, run.blocks[0]))
            after_backward[first.name] = call("all_gather", run.input)
        for inner in run.inside:
            first = next(op for op in graph.ops if _reads(op, inner.input, inner.module))
            last = graph.producer[inner.output].name
            before[first.name] = call("all_gather", inner.input)
            before_backward[last] = call("all_gather", inner.output)
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
