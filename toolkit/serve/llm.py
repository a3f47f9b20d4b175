"""The offline interface: `LLM(ref).generate(...)`, the server's engine in the caller's thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.serve.assemble import EngineSettings, assemble
from toolkit.serve.batch import Score
from toolkit.serve.engine import Output
from toolkit.serve.grammar import Grammars
from toolkit.serve.request import Request, SamplingParams, check_ids
from toolkit.timeline import Timeline

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """What came out for one prompt; scores where `logprobs` and `prompt_logprobs` ask for them."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    latency_s: float
    scores: tuple[Score, ...] = ()
    prompt_scores: tuple[Score, ...] = ()


class LLM:
    """A model in this process: prompts in, completions out, batched as the server would."""

    def __init__(self, ref: str | Path, settings: EngineSettings | None = None) -> None:
        """`ref`: a built-in name, a GGUF file, a Hugging Face folder, or a hub id when online."""
        self.name = str(ref)
        assembly = assemble(ref, settings or EngineSettings())
        self.engine, self.tokenizer = assembly.engine, assembly.tokenizer
        eos_ids = self.engine.scheduler.config.eos_ids
        self._vocab_size = assembly.vocab_size
        self._grammars = Grammars(self.tokenizer, assembly.vocab_size, eos_ids)
        self.engine.executor.start()
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Complete one prompt or many (text, or token ids), all batched together.

        `on_text(index, text)` hears each prompt's text as it grows. Raises UsageError for a
        prompt that is empty or too long.
        """
        encoded = [
            self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            for prompt in _many(prompts)
        ]
        return self._complete(encoded, params or SamplingParams(), on_text)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Completion:
        """Answer a conversation (OpenAI's `messages`) through the model's chat template."""
        ids = self.tokenizer.chat(messages)
        return self._complete([ids], params or SamplingParams(), on_text)[0]

    def stream(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """Yield the answer to a conversation in pieces; leaving the loop early ends generation."""
        requests = self._queue([self.tokenizer.chat(messages)], params or SamplingParams())
        for output in self._run(requests):
            if output.text:
                yield output.text

    def timeline(self) -> Timeline:
        """Return the measured spans of recent steps and requests."""
        return self.engine.timeline(f"serving {self.name}")

    def close(self) -> None:
        """Let go of the KV cache."""
        self.engine.executor.close()

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        on_text: Callable[[int, str], None] | None,
    ) -> list[Completion]:
        requests = self._queue(prompts, params)
        index = {request.id: i for i, request in enumerate(requests)}
        outputs: list[list[Output]] = [[] for _ in requests]
        for output in self._run(requests):
            at = index[output.request.id]
            outputs[at].append(output)
            if on_text is not None and output.text:
                on_text(at, output.text)
        return [_completion(*each) for each in zip(requests, outputs, strict=True)]

    def _queue(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Request]:
        if self.engine.has_work:
            raise ToolkitError(
                "this LLM is in the middle of a stream", remedy="read it to its end, or close it"
            )
        check_ids(params, self._vocab_size)
        now = self.engine.clock.now()
        requests = []
        for ids in prompts:
            self._num_requests += 1
            name = f"offline-{self._num_requests}"
            requests.append(Request(name, tuple(ids), params, arrival_s=now))
            if params.structured is not None:
                requests[-1].grammar = self._grammars.make(params.structured)
        for request in requests:
            # All are checked before any is queued, so that an error leaves nothing behind.
            self.engine.scheduler.validate(request)
        for request in requests:
            self.engine.add(request, self.tokenizer.stream(request.prompt_ids, params))
        return requests

    def _run(self, requests: Sequence[Request]) -> Iterator[Output]:
        """Yield what the engine produces until all is done; abort the rest when left early."""
        try:
            while self.engine.has_work:
                yield from self.engine.step().outputs
        finally:
            for request in requests:
                self.engine.abort(request)


def _many(prompts: Any) -> list[Prompt]:
    """Return a list of prompts: one text, or one list of token ids, counts as one prompt."""
    single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
    return [prompts] if single else list(prompts)


def _completion(request: Request, outputs: Sequence[Output]) -> Completion:
    reason = outputs[-1].finish_reason
    assert reason is not None, f"{request.id} has not ended"
    return Completion(
        prompt_token_ids=tuple(request.prompt_ids),
        token_ids=tuple(request.output_ids),
        text="".join(output.text for output in outputs),
        finish_reason=reason.value,
        latency_s=(request.finished_s or 0.0) - request.arrival_s,
        scores=tuple(output.score for output in outputs if output.score is not None),
        prompt_scores=outputs[0].prompt_scores,
    )
