"""Log-probabilities as OpenAI's two kinds of completion write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolkit.serve.batch import Score
from toolkit.serve.model.tokenizer import Tokenizer


class Writer:
    """Writes one choice's scores, piece by piece; text offsets count on from piece to piece."""

    def __init__(self, tokenizer: Tokenizer, *, chat: bool) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._offset = 0

    def write(self, scores: Sequence[Score]) -> dict[str, Any] | None:
        """Return the `logprobs` object of generated tokens, None where there are none."""
        if not scores:
            return None
        if self._chat:
            return {"content": [self._entry(score) for score in scores], "refusal": None}
        return self._columns([(score.token_id, score) for score in scores])

    def echo(self, prompt_ids: Sequence[int], scores: Sequence[Score]) -> dict[str, Any]:
        """Return the object of a prompt, whose first token follows nothing and has no score."""
        return self._columns(list(zip(prompt_ids, (None, *scores), strict=True)))

    def _columns(self, tokens: Sequence[tuple[int, Score | None]]) -> dict[str, Any]:
        made: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, score in tokens:
            text = self._text(token_id)
            made["tokens"].append(text)
            made["token_logprobs"].append(score and score.logprob)
            made["top_logprobs"].append(score and self._likeliest(score))
            made["text_offset"].append(self._offset)
            self._offset += len(text)
        return made

    def _likeliest(self, score: Score) -> dict[str, float]:
        """Return text -> log-probability. Of two tokens that read alike the likelier is told."""
        found = {self._text(score.token_id): score.logprob}
        return found | {self._text(token): logprob for token, logprob in reversed(score.top)}

    def _entry(self, score: Score) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in score.top]
        return self._token(score.token_id, score.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": self._text(token_id), "logprob": logprob, "bytes": list(raw)}

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


def joined(parts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the pieces of one choice's object as one."""
    whole: dict[str, Any] | None = None
    for part in parts:
        if whole is None or part is None:
            whole = whole or part
        else:
            whole = {
                key: value + part[key] if isinstance(value, list) else value
                for key, value in whole.items()
            }
    return whole
