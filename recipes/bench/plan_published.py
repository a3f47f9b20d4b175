"""Simulated steps against published ones: calibrate on one, predict the other.

    python recipes/bench/plan_published.py [--json FILE]

Published (nnScaler's documentation, measured by its authors; nothing here was measured by us):
- Llama3-8B, 131,072 tokens, one machine of 8 H100: 41.12 s a step, 133,252 TFLOP, accumulation 4,
  every layer recomputed, chunked loss.
- Llama3-70B, 8,192 tokens, 16 MI300X: 100.3 s a step, 64 accumulations; 2 stages of 4 devices, that
  twice as data parallel.

Which operator was split how is not published. Here Linears are split as Megatron-LM does it over
the devices of a stage, the head and the loss by tokens, and every block is recomputed. A
calibration is one factor on what all classes of operators reach of a device's peaks: the
catalogue's own guess, times the factor that makes one simulated step as long as the published one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from toolkit import ir, models
from toolkit.cost.calibration import Calibration, ClassFit, Errors
from toolkit.cost.roofline import default_coefficients
from toolkit.cost.work import OP_CLASSES
from toolkit.hardware import find_cluster
from toolkit.plan import chain
from toolkit.plan.library import grid
from toolkit.plan.plan import Plan, Prediction
from toolkit.plan.predict import predict
from toolkit.plan.program import pattern, rules, select
from toolkit.plan.subject import Subject


@dataclass(frozen=True)
class Case:
    """A published step: what was run, on what, and how long it took."""

    model: str
    tokens: int
    batch: int
    cluster: str
    degrees: dict[str, int]
    microbatches: int
    step_s: float
    mfu: float


CASES = {
    "8B on 8 H100": Case("llama3-8b", 131072, 4, "h100x8", {"tensor": 8}, 4, 41.12, 0.4096),
    "70B on 16 MI300X": Case(
        "llama3-70b", 8192, 128, "2xmi300xx8", {"pipeline": 2, "tensor": 4}, 64, 100.3, 0.242
    ),
}


def traced(case: Case) -> Subject:
    model = models.load(case.model, max_tokens=max(8192, case.tokens))
    graph = ir.trace_model(model, dtype=torch.bfloat16, batch=case.batch, tokens=case.tokens)
    return Subject(case.model, graph, "bfloat16")


def planned(case: Case, subject: Subject) -> Plan:
    """Return the plan that is assumed: see the head of this file."""
    cluster = find_cluster(case.cluster)
    plan = grid.plan(
        subject,
        cluster,
        num_ranks=cluster.num_devices,
        microbatches=case.microbatches,
        recompute=True,
        **case.degrees,
    )
    graph = subject.graph.at(batch=plan.microbatch)
    segments = chain.segments(graph)
    last = max(index for index, one in enumerate(segments) if one.path is not None)
    after = {op.name for one in segments[last + 1 :] for op in one.ops}
    made = {op.name for one in segments[: last + 1] for op in one.ops}
    starts = {
        graph.producer[name].name
        for op in graph.ops
        if op.name in after
        for name in op.inputs
        if name in graph.producer and graph.producer[name].name in made
    }
    dims = select.flow(graph, lambda op: rules.annotation(op, graph), sorted(starts), 1)
    head = {name: dim for name, dim in dims.items() if name in after}
    return replace(plan, splits=(*plan.splits, *pattern.splits(graph, head, "tensor")))


def calibrated(case: Case, factor: float) -> Calibration:
    """Return the default coefficients of every class on the case's device, times one factor."""
    device = find_cluster(case.cluster).device(0)
    exact = Errors.of([0.0])
    assert exact is not None
    classes = {}
    for op_class in OP_CLASSES:
        found = default_coefficients(op_class, device)
        scaled = replace(
            found,
            compute_efficiency=found.compute_efficiency * factor,
            memory_efficiency=found.memory_efficiency * factor,
        )
        classes[op_class] = ClassFit(scaled, exact)
    return Calibration(device.name, classes, (f"all defaults times {factor:.3f}",))


class Simulation:
    """One case, traced and planned once, simulated under any factor."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.subject = traced(case)
        self.plan = planned(case, self.subject)

    def prediction(self, factor: float = 1.0) -> Prediction:
        found = predict(
            self.plan,
            self.subject,
            find_cluster(self.case.cluster),
            calibration=calibrated(self.case, factor),
        ).prediction
        assert found is not None
        return found

    def factor(self) -> float:
        """The factor under which the simulated step is as long as the published one.

        A step is nearly a + b / factor: two such lines find it.
        """
        guesses = [1.0, 0.8]
        steps = [self.prediction(guess).step_s for guess in guesses]
        for _ in range(2):
            slope = (steps[-1] - steps[-2]) / (1 / guesses[-1] - 1 / guesses[-2])
            inverse = 1 / guesses[-1] + (self.case.step_s - steps[-1]) / slope
            guesses.append(1 / inverse)
            steps.append(self.prediction(guesses[-1]).step_s)
        return guesses[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    simulations = {name: Simulation(case) for name, case in CASES.items()}
    factors = {name: simulation.factor() for name, simulation in simulations.items()}
    rows: list[dict[str, Any]] = []
    for name, simulation in simulations.items():
        (other,) = set(simulations) - {name}
        for source, factor in (("nothing: the catalogue", 1.0), (other, factors[other])):
            found = simulation.prediction(factor)
            error = found.step_s / simulation.case.step_s - 1
            rows.append({
                "case": name, "calibrated_on": source, "factor": factor,
                "simulated_step_s": found.step_s, "published_step_s": simulation.case.step_s,
                "error": error, "simulated_mfu": found.mfu, "published_mfu": simulation.case.mfu,
                "model_tflop": found.model_flops / 1e12,
            })  # fmt: skip
            print(
                f"{name:18} calibrated on {source:22} (x {factor:.3f}): simulated "
                f"{found.step_s:6.2f} s, published {simulation.case.step_s:6.2f} s, {error:+.1%}; "
                f"MFU {found.mfu:.1%} against {simulation.case.mfu:.1%}; "
                f"{found.model_flops / 1e12:,.0f} TFLOP",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
