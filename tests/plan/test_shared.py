"""Collectives through memory: the same sums as torch's, and without them where ranks cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.hardware import find_cluster
from toolkit.plan import launch, library, subject
from toolkit.plan.predict.costs import Costs
from toolkit.plan.search.site import Mesh, Site

RANKS = str(Path(__file__).with_name("shared_ranks.py"))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sums_are_torch_s_over_random_buffers(num_ranks: int, tmp_path: Path) -> None:
    launch.run([RANKS, str(tmp_path), "6"], num_ranks)


def test_without_memory_for_files_there_are_plain_buffers(tmp_path: Path) -> None:
    launch.run([RANKS, str(tmp_path / "none"), "1"], 2)


def test_all_ranks_do_without_when_one_has_no_room(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NO_ROOM", "1")
    launch.run([RANKS, str(tmp_path), "1"], 2)
    assert not list(tmp_path.iterdir())


def test_only_cpus_of_one_machine_meet() -> None:
    """A prediction's calls are the same wherever they take place; what they cost is not."""
    found = subject.load("gpt-tiny", batch=8)
    plan = library.find("dp")(found, find_cluster("cpux2"))
    here, apart = Costs(plan, find_cluster("cpux2")), Costs(plan, find_cluster("2xcpux1"))
    met, called = (costs.meet("all_reduce", 1 << 20, (0, 1)) for costs in (here, apart))
    assert (met.kind, met.num_bytes) == (called.kind, called.num_bytes)
    assert met.stream == "compute"
    assert called == apart.call("all_reduce", 1 << 20, (0, 1))
    gpus = Costs(replace(plan), find_cluster("h100x8"))
    assert gpus.meet("all_reduce", 1 << 20, (0, 1)) == gpus.call("all_reduce", 1 << 20, (0, 1))


def test_the_search_sums_in_memory_only_what_no_program_runs() -> None:
    """The own executor reduces over the network: its plans are priced by that."""
    found, cluster = subject.load("gpt-tiny", batch=8), find_cluster("cpux4")
    native, program = (
        Site(found, cluster, Mesh(data=2, tensor=2), by_program=by) for by in (False, True)
    )
    size, ranks = 1 << 20, native.costs.group(("data",), 0)
    met, called = (
        native.costs.meet("all_reduce", size, ranks),
        native.costs.call("all_reduce", size, ranks),
    )
    assert native.meets("replicate")
    assert not program.meets("replicate")
    assert native.data_s("all_reduce", size, 0, meet=True) == met.seconds
    assert program.data_s("all_reduce", size, 0, meet=True) == called.seconds != met.seconds
