"""Constraints on the output, kept by xgrammar: compiled once, one matcher a request."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import torch

from toolkit import log
from toolkit.errors import require
from toolkit.serve.grammar_compiler import CompilerProcess, Vocabulary, shared
from toolkit.serve.model.tokenizer import Tokenizer
from toolkit.serve.structured import Structured

logger = log.get_logger(__name__)

_CACHE_BYTES = 256 * 2**20
# All other requests wait for this one's token: where its readings grow and grow, it ends.
_TOKEN_S = 1.0


class Grammars:
    """Compiles constraints for one model's vocabulary; equal ones are compiled once."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: Iterable[int],
        compiler: CompilerProcess | None = None,
    ) -> None:
        """`vocab_size` is the logits' width, which may exceed the tokenizer's."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._compiler = compiler or shared()
        self._lock = threading.Lock()
        self._vocabulary: tuple[Any, Vocabulary] | None = None
        self._kept: OrderedDict[Structured, Any] = OrderedDict()

    def submit(self, wanted: Structured) -> Future[Matcher]:
        """Do as `make` does, elsewhere: in no thread of the caller's. Raises QueueFullError."""
        compiled = self._known(wanted)
        if compiled is None:
            return self._compiler.submit(lambda: self.make(wanted))
        done: Future[Matcher] = Future()
        done.set_result(Matcher(compiled, self._vocab_size))
        return done

    def make(self, wanted: Structured) -> Matcher:
        """Return a matcher at the start of its text.

        Compiling takes milliseconds to seconds, so not in the engine's thread. Raises UsageError
        for a constraint that is malformed, not supported or beyond the bounds, MissingExtraError
        without xgrammar.
        """
        compiled = self._known(wanted)
        if compiled is None:
            xgrammar = require("xgrammar", extra="structured")
            info, vocabulary = self._written_down()
            content = self._compiler.compile(wanted, vocabulary)
            compiled = xgrammar.CompiledGrammar.deserialize_json(content, info)
            self._keep(wanted, compiled)
        return Matcher(compiled, self._vocab_size)

    def _written_down(self) -> tuple[Any, Vocabulary]:
        with self._lock:
            if self._vocabulary is None:
                info = self._tokenizer.for_xgrammar(self._vocab_size, self._eos_ids)
                content = info.serialize_json()
                name = hashlib.sha256(content.encode()).hexdigest()
                self._vocabulary = info, Vocabulary(name, content)
            return self._vocabulary

    def _known(self, wanted: Structured) -> Any:
        with self._lock:
            if wanted in self._kept:
                self._kept.move_to_end(wanted)
            return self._kept.get(wanted)

    def _keep(self, wanted: Structured, compiled: Any) -> None:
        """Keep the lately used, up to so many bytes."""
        with self._lock:
            self._kept[wanted] = compiled
            while sum(each.memory_size_bytes for each in self._kept.values()) > _CACHE_BYTES:
                self._kept.popitem(last=False)


class Matcher:
    """One request's place in its grammar."""

    def __init__(self, compiled: Any, vocab_size: int) -> None:
        xgrammar = require("xgrammar", extra="structured")
        self._apply = xgrammar.apply_token_bitmask_inplace
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._stuck = False

    @property
    def ended(self) -> bool:
        return self._stuck or bool(self._matcher.is_terminated())

    def accept(self, token_id: int) -> None:
        with self._watched():
            # A grammar may lead where no token of the vocabulary goes on: then the text ends there.
            self._stuck = not (self.ended or self._matcher.accept_token(token_id))

    def mask(self, logits: torch.Tensor) -> None:
        with self._watched():
            self._matcher.fill_next_token_bitmask(self._bitmask)
        self._apply(logits.unsqueeze(0), self._bitmask)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        start_s = time.thread_time()
        yield
        if time.thread_time() - start_s > _TOKEN_S:
            logger.warning("a constraint took over %g s for a token; its text ends", _TOKEN_S)
            self._stuck = True
