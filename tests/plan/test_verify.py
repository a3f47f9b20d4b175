"""The matrix of plans and families, and that what it checks can fail."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.errors import ToolkitError, UsageError
from toolkit.plan import counting, launch, library, verify
from toolkit.plan.counting import Call
from toolkit.plan.verify import start


def explain(rows) -> list[str]:
    return [f"{row.model} {row.strategy}: {row.outcome} {row.reason} {row.report}" for row in rows]


def test_every_plan_of_the_library_on_a_gpt() -> None:
    seen: list[tuple[str, int, int]] = []
    rows = verify.verify_all(2, quick=True, progress=lambda *event: seen.append(event))
    assert {row.strategy for row in rows} == set(library.STRATEGIES)
    bad = [row for row in rows if row.outcome not in ("holds", "not applicable")]
    assert not bad, explain(bad)
    for row in rows:
        assert (row.report is not None) == (row.outcome == "holds")
        assert bool(row.reason) == (row.outcome == "not applicable")
        if row.report:
            assert row.report.parity.num_gradients == 69
            assert row.report.update_error < 1e-5
            assert row.report.traffic
            assert not row.report.memory
    assert {"dp", "zero-1", "zero-2", "fsdp", "tp", "1f1b"} <= {
        r.strategy for r in rows if r.report
    }
    assert seen[-1][1] == seen[-1][2] == sum(row.report is not None for row in rows)


@pytest.mark.timeout(1800)  # 106 plans on two ranks took nine minutes on a busy machine
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_plan_on_every_family(num_ranks: int) -> None:
    rows = verify.verify_all(num_ranks, dtypes=("float32", "float64"))
    bad = [row for row in rows if row.outcome not in ("holds", "not applicable")]
    assert not bad, explain(bad)
    doubles = [row.report for row in rows if row.report and row.dtype == "float64"]
    assert doubles
    assert all(report.parity.tolerance == 1e-10 for report in doubles)
    assert all(row.report.memory for row in rows if row.report and row.dtype == "float32")


def test_one_rank_and_half_precision_are_refused() -> None:
    with pytest.raises(UsageError, match="2 or more"):
        verify.verify_all(1)
    with pytest.raises(UsageError, match="float32 or float64, not in bfloat16"):
        verify.verify_all(2, dtypes=("bfloat16",))


PAIR = (0, 1)
SEND, RECV = Call("send", 8, PAIR, peer=1), Call("recv", 8, PAIR, peer=0)
GATHER, REDUCE = Call("all_gather", 64, PAIR), Call("all_reduce", 32, PAIR)


def test_ranks_that_fit_together_have_no_faults() -> None:
    assert counting.faults([[SEND, GATHER, REDUCE], [GATHER, RECV, REDUCE]]) == ()


@pytest.mark.parametrize(
    ("logs", "fault"),
    [
        ([[SEND, SEND], [RECV]], "rank 0 sends 2 messages to rank 1, which receives 1"),
        ([[], [RECV]], "rank 0 sends 0 messages to rank 1"),
        ([[SEND], [RECV._replace(num_bytes=4)]], "8 bytes where it is sent and 4"),
        ([[SEND], [RECV._replace(tag=3)]], "which receives 0"),
        ([[GATHER, REDUCE], [REDUCE, GATHER]], r"collective 0 of ranks \[0, 1\] is all_gather"),
        ([[GATHER], []], "is all_gather of 64 bytes on rank 0 and none on rank 1"),
        ([[GATHER], [GATHER._replace(num_bytes=1)]], "all_gather of 1 bytes on rank 1"),
    ],
)
def test_what_does_not_fit_is_named(logs, fault: str) -> None:
    found = counting.faults(logs)
    assert found
    assert re.search(fault, found[0])


def test_a_report_with_any_fault_does_not_hold() -> None:
    from toolkit.plan.parity import Parity

    parity = Parity(1.0, 1.0, 0.0, 0.0, "w", 1, (), 1e-5)
    good = verify.Report("dp", "native", "float32", parity, 0.0, "w", ())
    assert good.holds
    assert not replace(good, faults=("ranks differ",)).holds
    assert not replace(good, update_error=1e-3).holds
    assert not replace(good, update_error=float("nan")).holds
    assert not replace(good, traffic=(verify.TrafficRow(0, "send", (1, 8), (1, 4)),)).holds
    assert not replace(good, parity=replace(parity, missing=("w",))).holds


@pytest.mark.parametrize("reported", [1, 2])
def test_a_rank_that_dies_stands_for_the_plan_it_was_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reported: int
) -> None:
    """After the last report there is none: only leaving failed, and what was found is kept."""
    starts = []

    def run(arguments, num_ranks, **_):
        starts.append(num_ranks)
        lines = ['{"refused": "as said"}\n'] * (reported if len(starts) == 1 else 1)
        Path(arguments[2]).write_text("".join(lines))
        if len(starts) == 1:
            raise ToolkitError("rank 1 of 2 was ended by SIGABRT")

    monkeypatch.setattr(launch, "run", run)
    jobs = [(tmp_path / "plan.json", "float32")] * 2
    found = start.run(jobs, 2)
    died = ["rank 1 of 2 was ended by SIGABRT"] * (reported == 1)
    assert found == ["as said"] * reported + died
    assert len(starts) == 1
