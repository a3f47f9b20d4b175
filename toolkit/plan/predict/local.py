"""What one rank sees of the model: the shapes of its share, and the calls that sharing makes."""

from __future__ import annotations

from toolkit.ir.graph import OpGraph
from toolkit.plan import chain, transform
from toolkit.plan.plan import Plan
from toolkit.plan.predict.costs import Call, Costs
from toolkit.plan.predict.passes import OpCalls


def split(plan: Plan, graph: OpGraph, costs: Costs) -> tuple[OpGraph, OpCalls]:
    """Return the graph of one rank's shapes, and the calls around its operators.

    `graph` is the model at one rank's microbatch, whole.
    """
    degree = plan.size("tensor")
    if degree == 1:
        return graph, OpCalls()
    regions = transform.regions(graph, chain.segments(graph), degree)
    ranks = costs.group(("tensor",), 0)

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
