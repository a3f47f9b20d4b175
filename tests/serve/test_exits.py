"""How the process of a server ends: with one message, a code, and no traceback of uvicorn's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from toolkit.hardware.affinity import thread_environment

# Each starts a process that loads a model.
pytestmark = pytest.mark.slow

# The command line, with an executor that does something else.
COMMAND = """
import time
from toolkit.cli.main import main
from toolkit.serve.executor import cpu

def run(self, batch):
    {body}

cpu.CpuExecutor.run = run
main()
"""


@contextlib.contextmanager
def running(model: Path, body: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, whose steps are `body`, and its URL."""
    command = [sys.executable, "-c", COMMAND.format(body=body), "serve", "run", str(model)]
    command += ["--port", "0", "--threads", "1", "--kv-memory", "16MiB", "--quantize", "int4"]
    with subprocess.Popen(
        [*command, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **thread_environment(1)},
    ) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())["url"]
        finally:
            process.kill()


def ask(url: str, model: Path) -> int:
    body = {"model": model.stem, "prompt": "a", "max_tokens": 4}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code


def test_the_fourth_fault_ends_the_process(smollm2_gguf: Path) -> None:
    with running(smollm2_gguf, "raise RuntimeError('broken')") as (process, url):
        assert [ask(url, smollm2_gguf) for _ in range(4)] == [503] * 4
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        assert json.loads(said.splitlines()[-1])["error"]["kind"] == "engine-dead"
        assert "4 faults within 10 minutes" in said.splitlines()[-1]


def test_a_second_interrupt_ends_at_once(smollm2_gguf: Path) -> None:
    with running(smollm2_gguf, "time.sleep(600)") as (process, url):

        def wait() -> None:
            with contextlib.suppress(httpx.HTTPError):
                ask(url, smollm2_gguf)

        def metrics() -> str:
            return httpx.get(f"{url}/metrics").text

        threading.Thread(target=wait, daemon=True).start()
        held = f'vllm:num_requests_running{{model_name="{smollm2_gguf.stem}"}} 1.0'
        while held not in metrics():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(httpx.HTTPError):
            # Until it takes no connections: it drains.
            while metrics():
                time.sleep(0.05)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 130
        assert said == ""
