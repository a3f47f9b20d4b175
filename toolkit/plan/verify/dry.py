"""A dry run: one rank of many runs a step on shapes alone, and its communication is counted.

torch's "fake" process group answers every call at once and FakeTensorMode computes shapes without
memory, so a plan for a thousand ranks is counted in seconds by one process. Ranks of a native plan
do the same (`verify` compares them where there are few), so rank 0 stands for all.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from toolkit.errors import FormatError, ToolkitError, UsageError
from toolkit.plan import io, launch
from toolkit.plan.lower import ladder
from toolkit.plan.plan import Plan
from toolkit.plan.verify.report import TrafficRow, compare_traffic


@dataclass(frozen=True)
class DryRun:
    """What rank 0 of a plan called in one step, beside its prediction; how long counting took and
    the memory of the process that did it.
    """

    strategy: str
    rung: str
    num_ranks: int
    traffic: tuple[TrafficRow, ...]
    seconds: float
    process_bytes: int

    @property
    def holds(self) -> bool:
        return all(row.holds for row in self.traffic)


def dry_run(plan: Plan, *, timeout_s: float = 300.0) -> DryRun:
    """Count one step of a plan of any number of ranks, in a process of its own.

    Raises UsageError for a plan of another rung than the native one, FormatError for a plan without
    prediction.
    """
    if ladder.rung(plan) != "native":
        raise UsageError(
            f"plan {plan.strategy} runs on the {ladder.rung(plan)} rung, whose ranks differ; a dry "
            "run counts one rank",
            remedy="verify it on as many ranks as this machine starts: toolkit plan verify",
        )
    if plan.prediction is None:
        raise FormatError("the plan holds no prediction to compare with")
    with tempfile.TemporaryDirectory(prefix="toolkit-dry-run-") as folder:
        path, out = Path(folder) / "plan.json", Path(folder) / "counted.json"
        io.save(plan, path)
        launch.run(["-m", "toolkit.plan.verify.dry", str(path), str(out)], 1, timeout_s=timeout_s)
        return TypeAdapter(DryRun).validate_python(json.loads(out.read_text()))


def count(plan: Plan) -> DryRun:
    """Run rank 0 of `plan` in this process, which must be in no process group."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode

    from toolkit import models
    from toolkit.plan import counting, runtime
    from toolkit.plan.lower.compat import start_fake_group
    from toolkit.plan.lower.recorder import Recorder

    started_s = time.perf_counter()
    start_fake_group(plan.num_ranks)
    try:
        here = runtime.Session(0, plan.num_ranks, torch.device("cpu"))
        mesh = runtime.mesh_of(plan, here)
        dtype = getattr(torch, plan.provenance.dtype)
        module = models.load(plan.provenance.model).build("meta", dtype, seed=plan.seed)
        shapes = runtime.global_batch(plan)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        sharded = bool(plan.placed("shard"))
        if not sharded:
            with fake:
                module.to_empty(device="cpu")
        # fully_shard asks its mesh for values, which shapes alone have not: it is called outside.
        with torch.device("meta") if sharded else fake:
            lowered = ladder.lower(plan, module, mesh, Recorder(0), {})
        with fake:
            if sharded:
                module.to_empty(device="cpu")
            batch = {name: torch.empty(shape, dtype=kind) for name, (shape, kind) in shapes.items()}
            with counting.Counter() as counter:
                lowered.step(batch)
        assert plan.prediction is not None
        return DryRun(
            strategy=plan.strategy,
            rung=lowered.rung,
            num_ranks=plan.num_ranks,
            traffic=compare_traffic(plan.prediction.traffic, [counter.calls]),
            seconds=time.perf_counter() - started_s,
            process_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
    finally:
        dist.destroy_process_group()


def main(arguments: Sequence[str]) -> None:
    plan, out = arguments
    Path(out).write_text(json.dumps(asdict(count(io.load(Path(plan))))))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ToolkitError as error:
        sys.exit(str(error))  # the parent shows it as what this process printed
