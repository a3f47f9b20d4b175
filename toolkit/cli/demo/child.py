"""Other toolkit commands, run as a user would: in processes of their own, read through --json."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.hardware.affinity import thread_environment

# How long the server may take to let go after it is asked to end.
_GRACE_S = 15.0


def toolkit(*arguments: str, threads: int, timeout_s: float = 600.0) -> dict[str, Any]:
    """Run `toolkit *arguments --json` and return the object it prints."""
    done = run([sys.executable, "-m", "toolkit", *arguments, "--json"], threads, timeout_s)
    try:
        return dict(json.loads(done))
    except ValueError as error:
        raise ToolkitError(f"`toolkit {' '.join(arguments)}` printed no JSON object") from error


def run(command: Sequence[str], threads: int, timeout_s: float) -> str:
    """Run a command with its thread pools limited; return its output, or raise what it said."""
    try:
        done = subprocess.run(
            command, env=_environment(threads), capture_output=True, text=True, timeout=timeout_s,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ToolkitError(f"`{_shown(command)}` did not end within {timeout_s:g} s") from error
    if done.returncode:
        raise _failure(command, done.returncode, done.stderr)
    return done.stdout


@contextlib.contextmanager
def server(*arguments: str, threads: int) -> Iterator[dict[str, Any]]:
    """Run `toolkit *arguments --json`, a server, and yield the line it prints when it is ready."""
    command = [sys.executable, "-m", "toolkit", *arguments, "--json"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=_environment(threads), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                process.wait()
                errors.seek(0)
                raise _failure(command, process.returncode, errors.read())
            yield dict(json.loads(line))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, **thread_environment(threads), "HF_HUB_OFFLINE": "1"}


def _shown(command: Sequence[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])


def _failure(command: Sequence[str], code: int, printed: str) -> ToolkitError:
    """What a command said on stderr: its JSON error when it has one, else its last lines."""
    lines = printed.strip().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = json.loads(line)["error"]
            return ToolkitError(f"{_shown(command)}: {said['message']}", remedy=said["remedy"])
    tail = "\n".join(lines[-8:])
    return ToolkitError(f"`{_shown(command)}` failed (exit {code}):\n{tail}")
