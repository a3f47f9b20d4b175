"""What clients send: OpenAI's request bodies, checked field by field.

A field this server cannot honour is refused unless its value asks for nothing; no field is
silently dropped, except those that only identify the caller and change no token.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from toolkit.errors import unknown_name
from toolkit.serve.request import SamplingParams

# Known and not supported -> the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
# These name the caller or a preference of hosting; no token depends on them.
_IDENTITY = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
)
_MAX_CHOICES = 16


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class _Body(BaseModel):
    """What both kinds of completion have in common. `None` is OpenAI's way to say "default"."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    _default_max_tokens: ClassVar[int | None] = None

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=_MAX_CHOICES)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Beyond OpenAI, under the names vLLM gave them.
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in _UNSUPPORTED:
                if value not in _UNSUPPORTED[name]:
                    raise PydanticCustomError(
                        "unsupported_parameter",
                        "{field} is not supported by this server yet; leave it out",
                        {"field": name},
                    )
            elif name not in _IDENTITY:
                hint = str(unknown_name("parameter", str(name), cls.model_fields))
                raise PydanticCustomError(
                    "unknown_parameter", "{hint}", {"field": str(name), "hint": hint}
                )
        return kept

    @model_validator(mode="after")
    def _agree(self) -> _Body:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "invalid_value",
                "stream_options needs stream to be true",
                {"field": "stream_options"},
            )
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4 or not all(stops):
            raise PydanticCustomError(
                "invalid_value", "stop takes up to 4 non-empty strings", {"field": "stop"}
            )
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def limit(self) -> int | None:
        """Return the most tokens to generate; None up to the context."""
        return self.max_tokens if self.max_tokens is not None else self._default_max_tokens

    def sampling(self, choice: int) -> SamplingParams:
        """Return how tokens of the given choice are drawn; OpenAI's default temperature is 1."""
        return SamplingParams(
            max_tokens=self.limit(),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            # Choices of one request differ, and each is repeatable.
            seed=None if self.seed is None else self.seed + choice,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionRequest(_Body):
    """`POST /v1/completions`: text or token ids in, text out."""

    _default_max_tokens: ClassVar[int | None] = 16  # OpenAI's

    prompt: str | list[int] | list[str] | list[list[int]] = Field(min_length=1)
    echo: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class ContentPart(BaseModel):
    """A piece of a message; only text is understood."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """Return the turn as chat templates take it; `developer` is a newer word for system."""
        role = "system" if self.role == "developer" else self.role
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        named = {"name": self.name} if self.name else {}
        return {"role": role, "content": text, **named}


class ChatRequest(_Body):
    """`POST /v1/chat/completions`: a conversation in, the assistant's turn out."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def limit(self) -> int | None:
        """Return the most tokens to generate; the newer name wins."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return super().limit()
