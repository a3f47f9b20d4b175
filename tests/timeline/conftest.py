"""A small pipeline, laid out by the rule of 1F1B, in whichever source a test asks for."""

import random

import pytest

from toolkit.timeline import Counter, Span, Timeline


def pipeline(
    stages=4, microbatches=8, forward_s=4e-3, backward_s=8e-3, source="predicted", spread=0.0
):
    """Return the spans of one 1F1B step; `spread` lengthens each op by up to that share, seeded."""
    draw = random.Random(0)
    ended: dict[tuple[str, int, int], float] = {}
    waiting = {stage: _order(stage, stages, microbatches) for stage in range(stages)}
    free_s = dict.fromkeys(range(stages), 0.0)
    spans = []
    while any(waiting.values()):
        for stage, queue in waiting.items():
            while queue:
                kind, index = queue[0]
                needs = _needs(kind, stage, index, stages)
                if needs is not None and needs not in ended:
                    break
                queue.pop(0)
                start_s = max(free_s[stage], ended.get(needs, 0.0))
                length_s = (forward_s if kind == "F" else backward_s) * (1 + spread * draw.random())
                free_s[stage] = ended[kind, stage, index] = start_s + length_s
                spans.append(
                    Span(
                        f"{kind}{index}",
                        f"rank {stage}",
                        start_s,
                        free_s[stage],
                        source,
                        "forward" if kind == "F" else "backward",
                        {"stage": stage, "microbatch": index},
                    )
                )
    return tuple(sorted(spans, key=lambda span: (span.track, span.start_s)))


def _order(stage, stages, microbatches):
    warmup = min(stages - stage - 1, microbatches)
    order = [("F", index) for index in range(warmup)]
    for index in range(microbatches):
        if warmup + index < microbatches:
            order.append(("F", warmup + index))
        order.append(("B", index))
    return order


def _needs(kind, stage, index, stages):
    if kind == "F":
        return ("F", stage - 1, index) if stage else None
    return ("B", stage + 1, index) if stage < stages - 1 else ("F", stage, index)


@pytest.fixture
def step():
    """Two stages, four microbatches, predicted and measured, with a counter."""
    predicted = pipeline(2, 4)
    measured = pipeline(2, 4, source="measured", spread=0.3)
    memory = Counter("activations", ((0.0, 1.0), (0.02, 4.0), (0.04, 2.0)), unit="GB")
    return Timeline("one step", predicted + measured, (memory,))
