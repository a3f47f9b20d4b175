"""What a model's operators really take on this machine, as the ranks of a plan would see it.

Ranks are started as for a plan and all run the model's own operators at once, so that they share
caches and memory as they will; no plan is run. From each operator's seconds, forward and backward,
a Calibration follows, which predicts plans of that model at other sizes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from toolkit.cost.calibration import Calibration
from toolkit.errors import UsageError
from toolkit.hardware import Cluster
from toolkit.plan import launch
from toolkit.plan.profile.fit import Observation, calibration

__all__ = ["Observation", "calibrate", "calibration", "observe"]

_RANKS = "toolkit.plan.profile.ranks"
_TIMEOUT_S = 300.0  # one model at one size


def calibrate(
    samples: Iterable[tuple[str, Mapping[str, int]]],
    cluster: Cluster,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Calibration:
    """Run models at sizes of one rank's microbatch on as many ranks as `cluster` has, and fit.

    Raises UsageError when the cluster is not of this machine's cores or nothing is given, and
    ToolkitError when a rank fails.
    """
    device = cluster.device(0)
    if device.kind != "cpu":
        raise UsageError(
            f"profiling runs on this machine's cores, and {cluster.name} is made of {device.name}",
            remedy="name cpux2, or another number of ranks on this machine",
        )
    found = observe(samples, cluster.num_devices, progress=progress)
    return calibration(found, device)


def observe(
    samples: Iterable[tuple[str, Mapping[str, int]]],
    num_ranks: int,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Observation]:
    """Return what every operator took; `progress` is told how many of the models are through."""
    jobs = [{"model": model, "sizes": dict(sizes)} for model, sizes in samples]
    if not jobs:
        raise UsageError("there is no model to profile")
    with tempfile.TemporaryDirectory(prefix="toolkit-profile-") as folder:
        out, work = Path(folder) / "found.jsonl", Path(folder) / "jobs.json"
        work.write_text(json.dumps(jobs))
        out.write_text("")
        launch.run(
            ["-m", _RANKS, str(out), str(work)],
            num_ranks,
            timeout_s=_TIMEOUT_S * len(jobs),
            # The last line is of no model: what torch's wrappers add.
            poll=lambda: progress(min(len(jobs), out.read_text().count("\n"))),
        )
        return [
            Observation.from_json(row)
            for line in out.read_text().splitlines()
            for row in json.loads(line)
        ]
