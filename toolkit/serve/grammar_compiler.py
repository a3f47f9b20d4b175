"""Constraints compiled in a process of their own, within bounds: a short one may ask for anything.

`([a-z]{0,30})` nested six deep takes minutes, a chain of 5,000 `$ref` overflows the compiler's
stack, and either would take the server with it. The process starts with the first constraint
(seconds), compiles one at a time, and is ended when one exceeds its bounds.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, TypeVar

from toolkit import log
from toolkit.errors import ToolkitError, UsageError
from toolkit.serve.queue import QueueFullError
from toolkit.serve.structured import Structured
from toolkit.units import format_bytes

logger = log.get_logger(__name__)

T = TypeVar("T")
# A small model left to itself may write blanks for ever: JSON allows any number of them.
_MOST_BLANKS = 16
_START_S = 120.0
# Of a text that is written to see what a token takes.
_TRIED_TOKENS = 128


@dataclass(frozen=True)
class Bounds:
    """What one constraint may take: its length, time and memory to compile it, its result.

    `step_s` is processor time of a token of a text it allows; `waiting` counts constraints.
    """

    source_bytes: int = 2**20
    compile_s: float = 20.0
    compile_bytes: int = 2**30
    compiled_bytes: int = 64 * 2**20
    step_s: float = 0.05
    waiting: int = 16


@dataclass(frozen=True)
class Vocabulary:
    """A model's vocabulary as xgrammar writes it down, and a name for it."""

    name: str
    content: str


class CompilerProcess:
    """The process and the way to it. Safe to use from several threads."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(self.bounds.waiting)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._known: set[str] = set()

    def submit(self, make: Callable[[], T]) -> Future[T]:
        """Run `make`, which compiles, in a thread kept for that. Raises QueueFullError."""
        if not self._places.acquire(blocking=False):
            raise QueueFullError(
                f"{self.bounds.waiting} constraints wait to be compiled, and no more may"
            )
        future = self._pool.submit(make)
        future.add_done_callback(lambda _: self._places.release())
        return future

    def compile(self, wanted: Structured, vocabulary: Vocabulary) -> str:
        """Return a constraint compiled, as xgrammar writes it down.

        Raises UsageError for one that is malformed, not supported or beyond the bounds,
        ToolkitError when the process cannot be started.
        """
        length = len(wanted.source.encode(errors="surrogatepass"))
        if length > self.bounds.source_bytes:
            raise UsageError(
                f"the {wanted.kind} constraint is {format_bytes(length)} long, and "
                f"{format_bytes(self.bounds.source_bytes)} is the most"
            )
        with self._lock:
            connection = self._started()
            content = None if vocabulary.name in self._known else vocabulary.content
            try:
                connection.send((wanted, vocabulary.name, content))
                if not connection.poll(self.bounds.compile_s):
                    self.close()
                    raise _beyond(wanted, f"takes more than {self.bounds.compile_s:g} s to compile")
                compiled, refusal = connection.recv()
            except (EOFError, OSError) as error:
                self.close()
                memory = format_bytes(self.bounds.compile_bytes)
                raise _beyond(
                    wanted, f"takes more than {memory} to compile, or is nested too deeply"
                ) from error
            self._known.add(vocabulary.name)
        if refusal is not None:
            raise UsageError(f"the {wanted.kind} constraint cannot be used: {refusal}")
        return str(compiled)

    def close(self) -> None:
        """End the process; the next constraint starts another."""
        if self._process is not None and self._connection is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
        self._process = self._connection = None
        self._known.clear()

    def _started(self) -> Connection[Any, Any]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._connection is None:
            ours, its = Pipe()
            path = os.pathsep.join(filter(None, sys.path))
            command = [sys.executable, "-m", __name__, str(its.fileno())]
            command.append(json.dumps(asdict(self.bounds)))
            with its:
                self._process = subprocess.Popen(
                    command,
                    pass_fds=[its.fileno()],
                    env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            self._connection = ours
            try:
                ready = ours.poll(_START_S) and ours.recv()
            except (EOFError, OSError):
                ready = False
            if not ready:
                self.close()
                raise ToolkitError("the process that compiles constraints did not start")
        return self._connection


def _beyond(wanted: Structured, what: str) -> UsageError:
    return UsageError(
        f"the {wanted.kind} constraint {what}, which is the bound",
        remedy="use fewer alternatives, less nesting or smaller repetitions",
    )


@functools.cache
def shared() -> CompilerProcess:
    """Return the one process of this one, whatever the number of models."""
    return CompilerProcess()


# -- in the process itself -----------------------------------------------------------------------


def main() -> None:
    """Compile what comes until nobody is there to ask."""
    import resource

    import xgrammar

    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    bounds = Bounds(**json.loads(sys.argv[2]))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + bounds.compile_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    compilers: dict[str, tuple[Any, Any]] = {}
    connection.send(True)
    while True:
        try:
            wanted, name, content = connection.recv()
        except EOFError:
            return
        # Whoever asked may be gone when it is time to end this.
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + bounds.compile_s) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        if content is not None:
            vocabulary = xgrammar.TokenizerInfo.deserialize_json(content)
            compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
            compilers[name] = compiler, vocabulary
        compiler, vocabulary = compilers[name]
        refusal: str | None
        try:
            compiled = _compiled(compiler, wanted)
            size = compiled.memory_size_bytes
            if size > bounds.compiled_bytes:
                allowed = format_bytes(bounds.compiled_bytes)
                refusal = f"compiled it takes {format_bytes(size)}, and {allowed} is the bound"
            else:
                refusal = _tried(xgrammar, compiled, vocabulary, bounds.step_s)
            connection.send((None if refusal else compiled.serialize_json(), refusal))
        except (RuntimeError, ValueError, TypeError) as error:
            if "bad_alloc" in str(error):
                # As when memory runs out where nothing catches it: whoever asked sees the end.
                return
            connection.send((None, _last_line(error)))


def _compiled(compiler: Any, wanted: Structured) -> Any:
    if wanted.kind == "json":
        return compiler.compile_json_schema(wanted.source, max_whitespace_cnt=_MOST_BLANKS)
    if wanted.kind == "regex":
        return compiler.compile_regex(wanted.source)
    return compiler.compile_grammar(wanted.source)


def _tried(xgrammar: Any, compiled: Any, vocabulary: Any, step_s: float) -> str | None:
    """Write a text that the constraint allows; return what is wrong if a token takes too long.

    An ambiguous grammar has ever more readings of a text, and the engine would wait for all.
    """
    import numpy as np

    matcher, draw = xgrammar.GrammarMatcher(compiled), np.random.default_rng(0)
    vocab_size = vocabulary.vocab_size
    bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
    for _ in range(_TRIED_TOKENS):
        start_s = time.process_time()
        matcher.fill_next_token_bitmask(bitmask)
        bits = np.unpackbits(bitmask.numpy().view(np.uint8), bitorder="little")
        # As long a text as it allows: only a long one shows.
        bits[vocabulary.stop_token_ids] = 0
        allowed = np.flatnonzero(bits[:vocab_size])
        if not len(allowed) or not matcher.accept_token(int(draw.choice(allowed))):
            return None
        if time.process_time() - start_s > step_s:
            return f"a token of it takes more than the bound of {step_s * 1e3:g} ms"
        if matcher.is_terminated():
            return None
    return None


def _last_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[-1][:500] if text else type(error).__name__


if __name__ == "__main__":
    main()
