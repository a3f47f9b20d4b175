"""Peak memory, predicted against tracked: library plans on gloo ranks of this machine.

    python recipes/bench/plan_memory.py [--ranks 2 4] [--models gpt swin evoformer t5] [--json FILE]

Every rank runs two whole training steps (AdamW included) and tracks, storage by storage, the most
it holds in the second; the prediction is made before, from the graph alone. Deterministic: no time
is measured, so a busy machine changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.plan.plan import Plan
    from toolkit.plan.runtime import Session

MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "gpt": ("gpt-mini", {"batch": 8, "tokens": 128}),
    "swin": ("swin-nano", {"batch": 8}),
    "evoformer": ("toolkit.plan.verify.matrix:evoformer_one_pass", {"batch": 8}),
    "t5": ("t5-tiny", {"batch": 8, "tokens": 64}),
}


def main() -> None:
    if "RANK" in os.environ:
        rank(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--strategies", nargs="+", help="default: all of the library")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [
        row
        for model in options.models
        for num_ranks in options.ranks
        for count in options.microbatches
        for row in compare(model, num_ranks, count, options.strategies)
    ]
    errors = [abs(row["error"]) for row in rows]
    print(f"median |error| {statistics.median(errors):.1%}, largest {max(errors):.1%}, "
          f"{len(rows)} plans")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def compare(
    model: str, num_ranks: int, microbatches: int, strategies: list[str] | None
) -> list[dict[str, Any]]:
    """Run every plan that applies, with and without recomputation; print and return its row."""
    from toolkit.errors import InfeasibleError
    from toolkit.hardware import find_cluster
    from toolkit.plan import io, launch, library, planner, subject

    reference, sizes = MODELS[model]
    traced = subject.load(reference, **sizes)
    cluster = find_cluster(f"cpux{num_ranks}")
    plans = {}
    for strategy in strategies or library.STRATEGIES:
        for recompute in (False, True):
            name = strategy + (" recomputed" if recompute else "")
            try:
                plans[name] = planner.make(
                    traced, cluster, strategy, num_ranks=num_ranks,
                    microbatches=microbatches, recompute=recompute,
                )  # fmt: skip
            except InfeasibleError as error:
                print(f"{model:10} {num_ranks} ranks {name:22} -- {str(error)[:120]}")
    with tempfile.TemporaryDirectory(prefix="plan-memory-") as folder:
        paths = [Path(folder) / f"{index}.json" for index in range(len(plans))]
        for path, plan in zip(paths, plans.values(), strict=True):
            io.save(plan, path)
        out = Path(folder) / "tracked.json"
        launch.run([__file__, str(out), *map(str, paths)], num_ranks)
        tracked = json.loads(out.read_text())
    return [
        row(model, microbatches, name, plan, found)
        for (name, plan), found in zip(plans.items(), tracked, strict=True)
    ]


def row(model: str, microbatches: int, name: str, plan: Plan, tracked: list[int]) -> dict[str, Any]:
    """The fullest position's peak, both ways."""
    assert plan.prediction is not None
    predicted = [sum(held.values()) for held in plan.prediction.memory_bytes]
    stride = plan.num_ranks // len(predicted)
    by_position = [max(tracked[i * stride : (i + 1) * stride]) for i in range(len(predicted))]
    want, got = max(by_position), max(predicted)
    error = got / want - 1
    print(f"{model:10} {plan.num_ranks} ranks {name:22} predicted {got / 2**20:8.2f} MiB  tracked "
          f"{want / 2**20:8.2f} MiB  {error:+.1%}", flush=True)  # fmt: skip
    return {
        "model": model, "ranks": plan.num_ranks, "microbatches": microbatches, "plan": name,
        "predicted_bytes": got, "tracked_bytes": want, "error": error,
        "predicted_by_position": plan.prediction.memory_bytes, "tracked_by_position": by_position,
    }  # fmt: skip


def rank(out: Path, paths: list[Path]) -> None:
    """What each rank runs: two steps of every plan, the second tracked."""
    import torch.distributed as dist

    from toolkit.plan import io, runtime

    with runtime.session() as here:
        found = []
        for path in paths:
            gathered: list[Any] = [None] * here.num_ranks
            dist.all_gather_object(gathered, peak_bytes(io.load(path), here))
            found.append(gathered)
        if here.rank == 0:
            out.write_text(json.dumps(found))
    runtime.leave()


def peak_bytes(plan: Plan, here: Session) -> int:
    """Return the most this rank holds in the second step of training."""
    import torch

    from toolkit.plan import runtime
    from toolkit.plan.tracking import Tracker

    batch = runtime.example(plan, here, batch=plan.provenance.sizes["batch"], seed=1)
    lowered = runtime.prepare(plan, here)
    trained = lowered.optimizer_parameters().values()
    # One optimizer each: whole and split parameters may not share one.
    optimizers = [torch.optim.AdamW([parameter]) for parameter in trained]
    with Tracker() as tracker:
        tracker.watch(lowered.parameters.values())
        tracker.watch(trained)
        for _ in range(2):
            tracker.reset()
            lowered.zero_gradients()
            lowered.step(batch)
            for optimizer in optimizers:
                optimizer.step()
            lowered.after_update()
    return tracker.peak_bytes


if __name__ == "__main__":
    main()
