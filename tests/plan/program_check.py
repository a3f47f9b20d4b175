"""Run plans on the own executor, on gloo ranks here, and hold them to one device and prediction."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.hardware import find_cluster
from toolkit.plan import io, launch
from toolkit.plan.lower.program import local
from toolkit.plan.plan import Plan
from toolkit.plan.subject import Subject

HERE = Path(__file__).parent


def check(
    plans: Sequence[Plan], subject: Subject, *, dtype: str = "float32"
) -> list[dict[str, Any]]:
    """Run each plan; assert that loss and gradients agree and traffic is as predicted."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index}.json" for index in range(len(plans))]
        for plan, path in zip(plans, paths, strict=True):
            io.save(plan, path)
        out = Path(folder) / "out.json"
        arguments = [str(HERE / "program_ranks.py"), str(out), dtype, *map(str, paths)]
        launch.run(arguments, plans[0].num_ranks, timeout_s=280)
        found = json.loads(out.read_text())
    scale = {"float32": 1, "float64": 2}[dtype]
    for plan, report in zip(plans, found, strict=True):
        parity = report["parity"]
        about = plan.strategy, plan.mesh, parity
        assert not parity["missing"], about
        assert parity["loss_error"] <= parity["tolerance"], about
        assert parity["gradient_error"] <= parity["tolerance"], about
        cluster = find_cluster(plan.provenance.cluster)
        predicted: dict[int, dict[str, tuple[int, int]]] = {}
        for row in local.traffic(plan, subject.graph, cluster):
            predicted.setdefault(row.position, {})[row.kind] = (row.count, row.num_bytes * scale)
        for rank, counted in enumerate(report["counted"]):
            position = rank // plan.stride("pipeline") % plan.size("pipeline")
            calls = {kind: tuple(value) for kind, value in counted.items()}
            assert calls == predicted.get(position, {}), (about, rank)
    return found
