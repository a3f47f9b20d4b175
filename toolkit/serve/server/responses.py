"""What clients get back: OpenAI's response bodies, whole or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.serve.request import FinishReason
from toolkit.serve.server import failures
from toolkit.serve.server.service import Call
from toolkit.serve.worker import EngineDeadError


@dataclass(frozen=True)
class Shape:
    """How one kind of completion is written: names, and how a choice carries its text."""

    prefix: str
    whole: str
    piece: str
    chat: bool

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """Return a finished choice."""
        carried: dict[str, Any] = {"text": text}
        if self.chat:
            carried = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **carried, "logprobs": None, "finish_reason": reason}

    def delta(
        self, index: int, text: str | None, reason: str | None, *, first: bool = False
    ) -> dict[str, Any]:
        """Return a piece of a choice; a chat's first piece names the role."""
        carried: dict[str, Any] = {"text": text or ""}
        if self.chat:
            role = {"role": "assistant"} if first else {}
            carried = {"delta": role | ({} if text is None else {"content": text})}
        return {"index": index, **carried, "logprobs": None, "finish_reason": reason}


COMPLETION = Shape("cmpl", "text_completion", "text_completion", chat=False)
CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", chat=True)


@dataclass(frozen=True)
class Answer:
    """One HTTP request being answered; whoever sends it enters and leaves `call`.

    `echo` holds the prompt texts to repeat, if asked for.
    """

    shape: Shape
    model: str
    call: Call
    num_prompts: int
    echo: Sequence[str] = ()
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    async def whole(self) -> dict[str, Any]:
        """Wait for every choice, then return the response's body."""
        texts = [self._opening(index) for index in range(len(self.call.requests))]
        reasons: list[str | None] = [None] * len(texts)
        async for index, output in self.call:
            texts[index] += output.text
            reasons[index] = _reason(output.finish_reason)
        choices = [
            self.shape.choice(index, text, reason)
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return self._body(self.shape.whole, choices) | {"usage": self._usage()}

    async def events(self, *, include_usage: bool) -> AsyncIterator[str]:
        """Yield the response as server-sent events."""
        usage: dict[str, Any] = {"usage": None} if include_usage else {}

        def event(*choices: dict[str, Any]) -> str:
            return _event(self._body(self.shape.piece, list(choices)) | usage)

        for index in range(len(self.call.requests)):
            opening = self._opening(index)
            if self.shape.chat or opening:
                yield event(self.shape.delta(index, opening, None, first=True))
        try:
            async for index, output in self.call:
                if output.text:
                    yield event(self.shape.delta(index, output.text, None))
                if output.finish_reason is not None:
                    yield event(self.shape.delta(index, None, _reason(output.finish_reason)))
        except EngineDeadError as error:
            # The status has been sent: all that is left is to say so in the stream.
            yield _event(failures.body(500, str(error), code="engine_dead"))
            return
        if include_usage:
            yield _event(self._body(self.shape.piece, []) | {"usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _opening(self, index: int) -> str:
        choices_each = len(self.call.requests) // self.num_prompts
        return self.echo[index // choices_each] if self.echo else ""

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.shape.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, int]:
        """Return token counts; a prompt counts once however many choices it has."""
        requests = self.call.requests
        firsts = requests[:: len(requests) // self.num_prompts]
        prompt = sum(len(request.prompt_ids) for request in firsts)
        completion = sum(len(request.output_ids) for request in requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
