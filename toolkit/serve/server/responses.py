"""What clients get back: OpenAI's response bodies, whole or as server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.serve.engine import Output
from toolkit.serve.request import FinishReason
from toolkit.serve.server import failures, logprobs
from toolkit.serve.server.service import Call
from toolkit.serve.server.tool_calls import CallPiece, CallReader, whole_calls
from toolkit.serve.worker import EngineDeadError


@dataclass(frozen=True)
class Shape:
    """The names of one kind of completion."""

    prefix: str
    whole: str
    piece: str
    chat: bool


COMPLETION = Shape("cmpl", "text_completion", "text_completion", chat=False)
CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", chat=True)


@dataclass(frozen=True)
class Piece:
    """What one step adds to a choice."""

    text: str = ""
    calls: tuple[CallPiece, ...] = ()
    scores: dict[str, Any] | None = None
    reason: str | None = None


class Choice:
    """Turns a choice's outputs into pieces."""

    def __init__(
        self,
        index: int,
        writer: logprobs.Writer,
        *,
        echo: str | None = None,
        reader: CallReader | None = None,
        shows_output: bool = True,
    ) -> None:
        """`echo` is the prompt's text, if it is to be repeated; `reader` finds tool calls."""
        self.index = index
        self._writer = writer
        self._echo = echo
        self._reader = reader
        self._shows_output = shows_output
        self._num_calls = 0

    def take(self, output: Output) -> Piece:
        """Return what one step adds."""
        parts: list[dict[str, Any] | None] = []
        text = ""
        if self._echo is not None and output.index == 0:
            text = self._echo
            if output.score is not None:
                parts.append(self._writer.echo(output.request.prompt_ids, output.prompt_scores))
        calls: list[CallPiece] = []
        if self._shows_output:
            if output.score is not None:
                parts.append(self._writer.write([output.score]))
            for piece in self._read(output):
                if isinstance(piece, CallPiece):
                    calls.append(piece)
                else:
                    text += piece
        self._num_calls += sum(call.name is not None for call in calls)
        return Piece(text, tuple(calls), logprobs.joined(parts), self._reason(output.finish_reason))

    def _read(self, output: Output) -> list[str | CallPiece]:
        if self._reader is None:
            return [output.text]
        pieces = self._reader.push(output.text)
        return pieces if output.finish_reason is None else pieces + self._reader.flush()

    def _reason(self, reason: FinishReason | None) -> str | None:
        if reason is None:
            return None
        if not self._shows_output:
            return FinishReason.LENGTH.value
        return "tool_calls" if self._num_calls and reason is FinishReason.STOP else reason.value


@dataclass(frozen=True)
class Answer:
    """One HTTP request being answered; whoever sends it enters and leaves `call`.

    `choice(i)` makes the i-th choice.
    """

    shape: Shape
    model: str
    call: Call
    choice: Callable[[int], Choice]
    shows_output: bool = True
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> dict[str, Any]:
        """Wait for every choice, then return the response's body."""
        choices = self._choices()
        pieces: list[list[Piece]] = [[] for _ in choices]
        async for index, output in self.call:
            pieces[index].append(choices[index].take(output))
        told = [self._told(index, parts) for index, parts in enumerate(pieces)]
        return self._body(self.shape.whole, told) | {"usage": self._usage()}

    async def events(
        self, *, include_usage: bool, continuous_usage: bool = False
    ) -> AsyncIterator[str]:
        """Yield the response as server-sent events."""
        choices = self._choices()

        def event(*told: dict[str, Any]) -> str:
            usage = {"usage": self._usage() if continuous_usage else None} if include_usage else {}
            return _event(self._body(self.shape.piece, list(told)) | usage)

        if self.shape.chat:
            for choice in choices:
                role = {"role": "assistant", "content": ""}
                yield event(
                    {"index": choice.index, "delta": role, "logprobs": None, "finish_reason": None}
                )
        try:
            async for index, output in self.call:
                for told in self._deltas(index, choices[index].take(output)):
                    yield event(told)
        except EngineDeadError as error:
            # The status has been sent: all that is left is to say so in the stream.
            yield _event(failures.body(500, str(error), code="engine_dead"))
            return
        if include_usage:
            yield _event(self._body(self.shape.piece, []) | {"usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _choices(self) -> list[Choice]:
        return [self.choice(index) for index in range(len(self.call.requests))]

    def _told(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return a finished choice."""
        text = "".join(piece.text for piece in pieces)
        carried: dict[str, Any] = {"text": text}
        if self.shape.chat:
            calls = whole_calls([call for piece in pieces for call in piece.calls])
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message |= {"content": text.strip() or None, "tool_calls": calls}
            carried = {"message": message}
        scores = logprobs.joined([piece.scores for piece in pieces])
        reason = pieces[-1].reason if pieces else None
        return {"index": index, **carried, "logprobs": scores, "finish_reason": reason}

    def _deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Return a piece as OpenAI streams it; the reason comes with an empty delta of its own."""
        made = []
        if piece.text or piece.calls or piece.scores:
            carried: dict[str, Any] = {"text": piece.text}
            if self.shape.chat:
                delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
                if piece.calls:
                    delta["tool_calls"] = [call.delta() for call in piece.calls]
                carried = {"delta": delta}
            told = {"index": index, **carried, "logprobs": piece.scores, "finish_reason": None}
            made.append(told)
        if piece.reason is not None:
            empty: dict[str, Any] = {"delta": {}} if self.shape.chat else {"text": ""}
            made.append({"index": index, **empty, "logprobs": None, "finish_reason": piece.reason})
        return made

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.call.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        """Return token counts; a prompt counts once however many choices it has."""
        requests, firsts = self.call.requests, self.call.firsts
        prompt = sum(len(request.prompt_ids) for request in firsts)
        completion = sum(len(request.output_ids) for request in requests) * self.shows_output
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(request.num_cached for request in firsts)
            },
        }


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
