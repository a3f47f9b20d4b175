"""Tool calls, read out of generated text as it comes: the formats of the model families.

Hermes (also Qwen): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, among other text.
Llama 3: the whole text is `{"name": ..., "parameters": {...}}`, several joined by `;`.
A forced call is JSON by construction: a list of calls, or one function's arguments alone.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

from toolkit.serve.model.tokenizer import overlap

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON = "<|python_tag|>"


@dataclass(frozen=True)
class CallPiece:
    """A piece of a tool call: the first of a call names the function, all add to its arguments."""

    index: int
    arguments: str
    name: str | None = None

    def delta(self) -> dict[str, Any]:
        """Return it as OpenAI streams it."""
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        return {
            "index": self.index,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


Piece = str | CallPiece


class CallReader(Protocol):
    """Splits a choice's text into plain text and calls."""

    def push(self, text: str) -> list[Piece]:
        """Return what is certain now that `text` has followed."""
        ...

    def flush(self) -> list[Piece]:
        """Return what was held back; the text has ended."""
        ...


class _Pieces:
    """Text not told yet, of which a reader takes off what is certain, and how many calls were."""

    def __init__(self) -> None:
        self._held = ""
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while (found := self._next()) is not None:
            pieces += found
        return pieces

    def _next(self) -> list[Piece] | None:
        """Take the next certain piece off the front; None when more text is needed."""
        raise NotImplementedError

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _numbered(self, found: Any) -> CallPiece | None:
        call = _call(found, self._num_calls)
        self._num_calls += call is not None
        return call


class HermesReader(_Pieces):
    """Calls between tags; whatever is between them and is no call stays text."""

    def _next(self) -> list[Piece] | None:
        start = self._held.find(_OPEN)
        if start < 0:
            start = len(self._held) - overlap(self._held, _OPEN)
        if start > 0:
            return [self._take(start)]
        end = self._held.find(_CLOSE)
        if end < 0:
            return None
        return [self._read(self._take(end + len(_CLOSE)))]

    def flush(self) -> list[Piece]:
        rest = self._take(len(self._held))
        # A model may end its turn without the closing tag.
        return [self._read(rest)] if rest.startswith(_OPEN) else _plain(rest)

    def _read(self, text: str) -> Piece:
        try:
            found = json.loads(text.removeprefix(_OPEN).removesuffix(_CLOSE))
        except ValueError:
            return text
        return self._numbered(found) or text


class LlamaReader:
    """The whole text is one call or several, or else it is plain text."""

    def __init__(self) -> None:
        self._held = ""
        self._decided = False

    def push(self, text: str) -> list[Piece]:
        if self._decided:
            return _plain(text)
        self._held += text
        begun = self._held.lstrip()
        if not begun or begun.startswith("{") or _PYTHON.startswith(begun[: len(_PYTHON)]):
            return []
        self._decided = True
        return _plain(self._held)

    def flush(self) -> list[Piece]:
        if self._decided:
            return []
        text, decoder, at = self._held.strip().removeprefix(_PYTHON), json.JSONDecoder(), 0
        calls: list[Piece] = []
        try:
            while at < len(text):
                found, at = decoder.raw_decode(text, at)
                call = _call(found, len(calls))
                if call is None:
                    return _plain(self._held)
                calls.append(call)
                at += len(text[at:]) - len(text[at:].lstrip("; \n"))
        except ValueError:
            return _plain(self._held)
        return calls


class ListReader(_Pieces):
    """A JSON list of calls; each is told when it is complete."""

    def _next(self) -> list[Piece] | None:
        start = self._held.find("{")
        if start < 0:
            return None
        try:
            found, end = json.JSONDecoder().raw_decode(self._held, start)
        except ValueError:
            return None
        self._take(end)
        call = self._numbered(found)
        return [] if call is None else [call]

    def flush(self) -> list[Piece]:
        return []


class ArgumentsReader:
    """The text is the arguments of one function, told as they come."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def push(self, text: str) -> list[Piece]:
        if not text:
            return []
        name, self._name = self._name, None
        return [CallPiece(0, text, name)]

    def flush(self) -> list[Piece]:
        return []


FORMATS: dict[str, type[HermesReader] | type[LlamaReader]] = {
    "hermes": HermesReader,
    "llama3_json": LlamaReader,
}


def format_of(chat_template: str) -> str:
    """Return the name of the format that a chat template teaches its model.

    >>> format_of("... <tool_call> ..."), format_of("... <|python_tag|> ..."), format_of("")
    ('hermes', 'llama3_json', 'hermes')
    """
    llama = _PYTHON in chat_template or '"parameters": dictionary' in chat_template
    return "llama3_json" if llama and _OPEN not in chat_template else "hermes"


def whole_calls(pieces: list[CallPiece]) -> list[dict[str, Any]]:
    """Return complete calls, as a whole answer carries them, from all their pieces."""
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if piece.index not in calls:
            calls[piece.index] = piece.delta()
            calls[piece.index].pop("index")
        else:
            calls[piece.index]["function"]["arguments"] += piece.arguments
    return list(calls.values())


def _call(found: Any, index: int) -> CallPiece | None:
    """Return a call from its JSON, or None when it is none."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return CallPiece(index, arguments, found["name"])


def _plain(text: str) -> list[Piece]:
    return [text] if text else []
