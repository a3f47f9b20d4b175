"""A contender that runs: a server behind a URL, or a driver that holds the engine in its process.

Both take a load and say what came of every request. One that is not measured is stopped
(SIGSTOP), so that it takes nothing from the other.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from toolkit.errors import ToolkitError
from toolkit.serve.bench import client
from toolkit.serve.bench.client import Sample, Target
from toolkit.serve.bench.exchange import on_a_loop
from toolkit.serve.bench.load import Arrival

_START_S = 300.0
_RUN_S = 300.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Running(ABC):
    """A process group of its own that computes for whoever holds it."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, **pipes: Any
    ) -> None:
        self._log = log
        with log.open("wb") as written:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stderr=written,
                stdout=pipes.get("stdout", written),
                stdin=pipes.get("stdin", subprocess.DEVNULL),
                start_new_session=True,
            )

    @abstractmethod
    def send(self, arrivals: Sequence[Arrival], prompts: Sequence[Sequence[int]]) -> list[Sample]:
        """Send every request at its time; return what came, failures among it."""

    def pause(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        self.resume()
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _ended(self) -> ToolkitError:
        last = self._log.read_text(errors="replace").splitlines()[-12:]
        return ToolkitError(
            f"{self._process.args!r} ended with {self._process.poll()}:\n" + "\n".join(last),
            remedy=f"see {self._log}",
        )


class Server(Running):
    """An OpenAI-compatible server; `{port}` in its command is replaced by a free one."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        extra: Mapping[str, Any],
    ) -> None:
        port = free_port()
        super().__init__([part.format(port=port) for part in command], environment, log)
        self._url, self._extra = f"http://127.0.0.1:{port}/v1", extra
        self._wait(f"http://127.0.0.1:{port}/health")
        self._model = client.first_model(self._url, None)

    def _wait(self, url: str) -> None:
        end_s = time.monotonic() + _START_S
        while time.monotonic() < end_s:
            if self._process.poll() is not None:
                raise self._ended()
            try:
                if httpx.get(url, timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        self.close()
        raise ToolkitError(
            f"{url} did not answer within {_START_S:.0f} s", remedy=f"see {self._log}"
        )

    def send(self, arrivals: Sequence[Arrival], prompts: Sequence[Sequence[int]]) -> list[Sample]:
        target = Target(self._url, self._model, timeout_s=_RUN_S, extra=self._extra)
        return on_a_loop(client.run(target, arrivals, prompts))


class Driver(Running):
    """A script that holds an engine, takes loads as JSON lines and answers in JSON lines."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        super().__init__(command, environment, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise self._ended()
        return json.loads(line)

    def ask(self, **job: Any) -> Any:
        """Send one job and return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def send(self, arrivals: Sequence[Arrival], prompts: Sequence[Sequence[int]]) -> list[Sample]:
        requests = [
            {"at_s": each.at_s, "prompt": list(ids), "output_tokens": each.output_tokens}
            for each, ids in zip(arrivals, prompts, strict=True)
        ]
        answers = self.ask(requests=requests)
        return [
            Sample(
                arrival,
                found["sent_s"],
                found["end_s"],
                tuple(found["piece_s"]),
                len(ids),
                found["output_tokens"],
                found.get("error"),
            )
            for arrival, ids, found in zip(arrivals, prompts, answers, strict=True)
        ]
