"""SuperScaler's two new pipelines: 3F1B, whose passes share stages, and the interlaced pipeline,
whose embedding shares all devices (arXiv 2301.08984, section 2 and figures 3 and 4).
"""

from __future__ import annotations

from dataclasses import replace

from toolkit.plan.order import greedy
from toolkit.plan.order.action import Action, Rows
from toolkit.plan.order.clock import run
from toolkit.plan.order.pipeline import Order, Stage, chain
from toolkit.plan.order.problem import Problem
from toolkit.plan.order.simple import check_counts, loop, one_f_one_b


def three_f_one_b(
    num_devices: int, num_microbatches: int, *, num_forwards: int = 3, stage: Stage | None = None
) -> Order:
    """A sample goes forward through all devices three times and back once: AlphaFold 2's
    recycling, whose first passes take no gradient and keep nothing.

    Pass r of device d is stage r p + d. The order is a list schedule for the costs of `stage`
    (by default backward = 2 forwards): what frees memory goes first, what takes it last, and at
    most p microbatches are kept on any device, as in 1F1B.

    >>> [" ".join(map(str, row)) for row in three_f_one_b(1, 2).rows]
    ['0F0 1F0 0F1 1F1 2F0 2B0 2F1 2B1']
    """
    check_counts(num_devices, num_microbatches, num_forwards)
    last = num_devices * (num_forwards - 1)
    no_grad = frozenset(range(last))
    placement = loop(num_devices, num_forwards)
    # Memory counts microbatches here, whatever one of them takes.
    cost = replace(stage or Stage(), memory=1.0, kept=None)
    one = chain(placement, cost, no_grad=no_grad, memory_limit=num_devices)
    rows = greedy.schedule(one.repeat(num_microbatches), "memory aware").rows
    return Order(f"{num_forwards}F1B", placement, num_microbatches, rows, no_grad)


def interlaced(num_devices: int, num_microbatches: int) -> Order:
    """1F1B of the layers; embedding and head, split over all devices, run in between.

    Stage 0 is the embedding and stage p + 1 the head, both on every device; stage s is on device
    s - 1. Every shared block stands in 1F1B's own order where its microbatch needs it: the
    embedding before the first layer's forward, the head (forward and backward) after the last's,
    the embedding's backward after the first layer's. All devices therefore run the shared blocks in
    the same order.

    >>> [" ".join(map(str, row)) for row in interlaced(1, 1).rows]
    ['0F0 1F0 2F0 2B0 1B0 0B0']
    """
    check_counts(num_devices, num_microbatches)
    layers = run(one_f_one_b(num_devices, num_microbatches), Stage(1, 1, 0))
    head = num_devices + 1
    # (when in 1F1B of equal steps, what comes first then)
    at: dict[Action, tuple[float, int]] = {}
    for i, block in enumerate(layers.problem.blocks):
        stage, kind, microbatch = block.action
        start, end = layers.starts[i], layers.ends[i]
        at[Action(stage + 1, kind, microbatch)] = (start, 1)
        if stage == 0 and kind == "F":
            at[Action(0, "F", microbatch)] = (start, 0)
        if stage == num_devices - 1 and kind == "F":
            at[Action(head, "F", microbatch)] = (end, -3)
            at[Action(head, "B", microbatch)] = (end, -2)
        if stage == 0 and kind == "B":
            at[Action(0, "B", microbatch)] = (end, -1)
    order = sorted(at, key=lambda action: (at[action], action))
    everyone = tuple(range(num_devices))
    placement = (everyone, *((device,) for device in range(num_devices)), everyone)
    rows: Rows = tuple(
        tuple(action for action in order if device in placement[action.stage])
        for device in range(num_devices)
    )
    return Order("interlaced", placement, num_microbatches, rows)


def interlaced_costs(num_devices: int, shared: Stage, layer: Stage) -> tuple[Stage, ...]:
    """Return the costs of an interlaced pipeline's stages: embedding, layers, head."""
    return (shared, *[layer] * num_devices, shared)


def published_interlaced() -> Problem:
    """Return one microbatch of the interlaced schedule that SuperScaler's artifact ships: 4
    devices, shared blocks of span 1, layers of 1 forward and 3 backward (osdi24ae:
    cupilot/mllm.4stages.sched.json). Its schedule of 6 microbatches takes 60 and holds 6.
    """
    shared, layer = Stage(1, 1, 0, 0), Stage(1, 1, 2, 1)
    everyone = (0, 1, 2, 3)
    return chain(
        [everyone, (0,), (1,), (2,), (3,), everyone],
        interlaced_costs(4, shared, layer),
        memory_limit=6,
    )
