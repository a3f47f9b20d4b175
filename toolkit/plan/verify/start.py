"""Starting the ranks that verify plans: once for many, and what each plan came to as it comes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from toolkit.errors import FormatError, ToolkitError, UsageError
from toolkit.log import get_logger
from toolkit.plan import io, launch, parity
from toolkit.plan.verify.report import Report, from_json

# Called with how many plans are through, as they come.
Progress = Callable[[int], None]
_log = get_logger(__name__)
_RANKS = "toolkit.plan.verify.ranks"
# Plans that ranks run before they are started anew: gloo keeps threads and sockets for every group.
_MOST_PLANS = 24
_TIMEOUT_S = 120.0  # a plan; a hang must not last


def verify(
    paths: Sequence[Path],
    *,
    dtype: str = "float32",
    measure: bool = False,
    progress: Progress = lambda done: None,
) -> list[Report]:
    """Run each plan on this machine and compare it with one device and with its prediction.

    All plans must be for the same number of ranks. With `measure`, memory is tracked and steps are
    timed. Raises UsageError or FormatError for a plan file that cannot be read, ToolkitError when
    a plan cannot be run or a rank fails.
    """
    parity.tolerance(dtype)
    plans = [io.load(path) for path in paths]
    numbers = sorted({plan.num_ranks for plan in plans})
    if len(numbers) != 1:
        raise UsageError(
            f"these plans are for {' and '.join(map(str, numbers))} ranks",
            remedy="verify plans of one number of ranks together",
        )
    for path, plan in zip(paths, plans, strict=True):
        if plan.prediction is None:
            raise FormatError(f"{path} holds no prediction to compare with")
    found = run([(path, dtype) for path in paths], numbers[0], measure=measure, progress=progress)
    reports = []
    for path, entry in zip(paths, found, strict=True):
        if isinstance(entry, str):
            raise ToolkitError(f"{path}: {entry}")
        reports.append(entry)
    return reports


def run(
    jobs: Sequence[tuple[Path, str]],
    num_ranks: int,
    *,
    measure: bool = False,
    progress: Progress = lambda done: None,
) -> list[Report | str]:
    """Verify (plan file, dtype) pairs on `num_ranks` ranks that are started once for many.

    What a rank refuses in words stands in the place of its report. If a rank dies or hangs, so
    does what it printed, and ranks are started anew for the jobs after it.
    """
    found: list[Report | str] = []
    with tempfile.TemporaryDirectory(prefix="toolkit-verify-") as folder:
        out, work = Path(folder) / "reports.jsonl", Path(folder) / "jobs.json"
        while len(found) < len(jobs):
            before = len(found)
            left = jobs[before : before + _MOST_PLANS]
            body = [{"plan": str(path.resolve()), "dtype": dtype} for path, dtype in left]
            work.write_text(json.dumps(body))
            out.write_text("")

            def poll(before: int = before) -> None:
                progress(before + len(_lines(out)))

            try:
                launch.run(
                    ["-m", _RANKS, str(out), str(work), *(["--measure"] if measure else [])],
                    num_ranks,
                    timeout_s=_TIMEOUT_S * len(left),
                    poll=poll,
                )
                died = ""
            except ToolkitError as error:
                died = str(error)
            found += [
                entry["refused"] if "refused" in entry else from_json(entry)
                for entry in map(json.loads, _lines(out))
            ]
            if died and len(found) < before + len(left):
                found.append(died)
            elif died:  # every plan is through: only leaving failed
                _log.warning("%s", died)
            progress(len(found))
    return found


def _lines(path: Path) -> list[str]:
    """The whole lines so far."""
    return path.read_text().splitlines() if path.read_text().endswith("\n") else []
