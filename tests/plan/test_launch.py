from __future__ import annotations

import pytest

from toolkit.errors import ToolkitError
from toolkit.plan import launch

RANK = "import os, signal, sys, time; rank = int(os.environ['RANK']); "


def test_ranks_get_torchruns_environment() -> None:
    script = RANK + (
        "assert os.environ['WORLD_SIZE'] == os.environ['LOCAL_WORLD_SIZE'] == '3';"
        "assert os.environ['LOCAL_RANK'] == str(rank);"
        "assert os.environ['MASTER_ADDR'] and int(os.environ['MASTER_PORT']);"
        "assert int(os.environ['OMP_NUM_THREADS']) >= 1"
    )
    launch.run(["-c", script], 3)


def test_a_killed_rank_is_named_with_its_signal_and_the_others_end() -> None:
    script = RANK + "rank == 1 and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)"
    with pytest.raises(ToolkitError, match="rank 1 of 2 was ended by SIGKILL"):
        launch.run(["-c", script], 2)


def test_a_failed_rank_is_named_with_what_it_printed() -> None:
    script = RANK + "rank == 0 and sys.exit('no such thing'); time.sleep(60)"
    with pytest.raises(ToolkitError, match=r"rank 0 of 2 failed \(exit 1\).*\n.*no such thing"):
        launch.run(["-c", script], 2)


def test_the_rank_that_lost_its_peer_is_not_blamed() -> None:
    script = RANK + "sys.exit('Connection closed by peer' if rank == 0 else 'the cause')"
    with pytest.raises(ToolkitError, match="the cause"):
        launch.run(["-c", script], 2)


def test_where_all_fail_the_one_that_says_why_is_shown() -> None:
    script = RANK + "rank == 0 and time.sleep(0.7); sys.exit('the cause' if rank == 0 else 2)"
    with pytest.raises(ToolkitError, match=r"rank 0 of 2 failed.*\n.*the cause"):
        launch.run(["-c", script], 2)


def test_ranks_that_hang_are_ended() -> None:
    with pytest.raises(ToolkitError, match=r"2 ranks did not finish within 0\.5 s"):
        launch.run(["-c", "import time; time.sleep(60)"], 2, timeout_s=0.5)


def test_a_plan_for_another_number_of_ranks_says_how_to_start(tiny, two_ranks) -> None:
    import torch

    from toolkit.plan import planner, runtime

    plan = planner.make(tiny, two_ranks, "dp")
    with pytest.raises(ToolkitError, match=r"for 2 ranks and 3 were started.*--nproc-per-node 2"):
        runtime.mesh_of(plan, runtime.Session(0, 3, torch.device("cpu")))


def test_a_process_that_is_no_rank_is_told_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.plan import runtime

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ToolkitError, match="torchrun"), runtime.session():
        pass


def test_a_rank_that_is_done_leaves_whatever_its_threads_do() -> None:
    """Its output is there, and Python's teardown, which could abort, is not gone through."""
    script = (
        "import atexit, os; from toolkit.plan import runtime;"
        "atexit.register(os.abort); print('done'); runtime.leave()"
    )
    launch.run(["-c", script], 2)
