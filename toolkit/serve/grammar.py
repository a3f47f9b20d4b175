"""Constraints on the output, kept by xgrammar: compiled once, one matcher a request."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch

from toolkit.errors import UsageError, require
from toolkit.serve.model.tokenizer import Tokenizer
from toolkit.serve.structured import Structured

_CACHE_BYTES = 256 * 2**20
# A small model left to itself may write blanks for ever: JSON allows any number of them.
_MOST_BLANKS = 16


class Grammars:
    """Compiles constraints for one model's vocabulary; equal ones are compiled once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]) -> None:
        """`vocab_size` is the logits' width, which may exceed the tokenizer's."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._lock = threading.Lock()
        self._compiler: Any = None

    def make(self, wanted: Structured) -> Matcher:
        """Return a matcher at the start of its text.

        Compiling takes milliseconds to seconds, so not in the engine's thread. Raises UsageError
        for a constraint that is malformed or not supported, MissingExtraError without xgrammar.
        """
        xgrammar = require("xgrammar", extra="structured")
        with self._lock:
            if self._compiler is None:
                vocabulary = self._tokenizer.for_xgrammar(self._vocab_size, self._eos_ids)
                # One thread: the others' cores are the engine's.
                self._compiler = xgrammar.GrammarCompiler(
                    vocabulary, max_threads=1, cache_limit_bytes=_CACHE_BYTES
                )
        try:
            return Matcher(xgrammar, self._compiled(wanted), self._vocab_size)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UsageError(
                f"the {wanted.kind} constraint cannot be used: {_last_line(error)}"
            ) from error

    def _compiled(self, wanted: Structured) -> Any:
        if wanted.kind == "json":
            return self._compiler.compile_json_schema(
                wanted.source, max_whitespace_cnt=_MOST_BLANKS
            )
        if wanted.kind == "regex":
            return self._compiler.compile_regex(wanted.source)
        return self._compiler.compile_grammar(wanted.source)


class Matcher:
    """One request's place in its grammar."""

    def __init__(self, xgrammar: Any, compiled: Any, vocab_size: int) -> None:
        self._apply = xgrammar.apply_token_bitmask_inplace
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._stuck = False

    @property
    def ended(self) -> bool:
        return self._stuck or bool(self._matcher.is_terminated())

    def accept(self, token_id: int) -> None:
        # A grammar may lead where no token of the vocabulary goes on: then the text ends there.
        self._stuck = not (self.ended or self._matcher.accept_token(token_id))

    def mask(self, logits: torch.Tensor) -> None:
        self._matcher.fill_next_token_bitmask(self._bitmask)
        self._apply(logits.unsqueeze(0), self._bitmask)


def _last_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__
