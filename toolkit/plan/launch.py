"""Starting ranks on this machine, as torchrun would, and saying clearly which one failed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from toolkit.errors import ToolkitError
from toolkit.hardware.affinity import thread_environment, usable_cores

# The last lines of a failed rank's output that are shown.
_TAIL_LINES = 12
# How long others may take to fail of the same cause, and say so, before one is blamed.
_SETTLE_S = 2.0
# How long the others may take to notice and end before they are ended.
_GRACE_S = 5.0


def run(
    arguments: Sequence[str],
    num_ranks: int,
    *,
    timeout_s: float = 600.0,
    poll: Callable[[], None] | None = None,
) -> None:
    """Run `python *arguments` as `num_ranks` local ranks and wait for all of them.

    Each rank gets torchrun's environment and an equal part of this machine's cores. `poll` is
    called while waiting. Raises ToolkitError naming the first rank that failed, with the end of
    what it printed; the others are ended. torchrun itself is not used because its agent costs a
    second start of torch and hides which rank failed first.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="toolkit-ranks-") as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(num_ranks)]
        ranks = [_start(arguments, rank, num_ranks, port, log) for rank, log in enumerate(logs)]
        try:
            _wait(ranks, logs, timeout_s, poll)
        finally:
            _end(ranks)


def _start(
    arguments: Sequence[str], rank: int, num_ranks: int, port: int, log: Path
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        **thread_environment(usable_cores() // num_ranks),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT
        )


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]],
    logs: Sequence[Path],
    timeout_s: float,
    poll: Callable[[], None] | None,
) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.poll()]
        if failed:
            # Where all fail alike one may say why, and a rank that lost its peer fails after it.
            settled = time.monotonic() + _SETTLE_S
            while time.monotonic() < settled and any(one.poll() is None for one in ranks):
                time.sleep(0.05)
            raise _failure(ranks, logs)
        if time.monotonic() > deadline:
            raise ToolkitError(
                f"{len(ranks)} ranks did not finish within {timeout_s:g} s",
                remedy="a rank may be waiting for one that does not come; see its output:\n"
                + _tail(logs[0]),
            )
        if poll:
            poll()
        time.sleep(0.05)
    if any(process.returncode for process in ranks):
        raise _failure(ranks, logs)


def _failure(ranks: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> ToolkitError:
    """The error of the rank to blame: a killed one first, then one that lost no peer, says why."""
    failed = [(rank, process.poll()) for rank, process in enumerate(ranks) if process.poll()]
    tails = {rank: _tail(logs[rank]) for rank, _ in failed}
    rank, code = min(
        failed,
        key=lambda entry: (
            (entry[1] or 0) > 0,
            "closed by peer" in tails[entry[0]],
            not tails[entry[0]],
            entry[0],
        ),
    )
    assert code is not None
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed (exit {code})"
    printed = tails[rank]
    return ToolkitError(
        f"rank {rank} of {len(ranks)} {how}; the other ranks were ended"
        + (f". It printed:\n{printed}" if printed else "")
    )


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for process in ranks:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
