"""What clients send to be completed: OpenAI's request bodies, checked field by field.

A field this server cannot honour is refused unless its value asks for nothing; no field is
silently dropped, except those that only identify the caller and change no token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from toolkit.errors import unknown_name
from toolkit.serve.programs.identity import FIELDS
from toolkit.serve.request import SamplingParams
from toolkit.serve.server.constraints import Constrained

# Known and not supported -> the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "store": (None, False),
    "suffix": (None, ""),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    # vLLM's, which its clients send at their defaults.
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None, True),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "length_penalty": (None, 1),
    "prompt_logprobs": (None,),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}
# These name the caller, its program (`programs.identity`) or a preference of hosting; no token
# depends on them.
_IDENTITY = tuple(
    sorted(
        FIELDS | {"prompt_cache_retention", "request_id", "safety_identifier", "service_tier"},
    )
)
_MAX_CHOICES = 16
_INT64 = 2**63


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] | None = None


class Body(Constrained):
    """What both kinds of completion have in common. `None` is OpenAI's way to say "default"."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    _default_max_tokens: ClassVar[int | None] = None

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=_MAX_CHOICES)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    # Beyond OpenAI, under the names vLLM gave them.
    top_k: int | None = Field(None, ge=-1, lt=_INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    priority: int | None = Field(None, ge=-_INT64, lt=_INT64)
    cache_salt: str | None = Field(None, min_length=1)

    _said: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _note_the_caller(cls, data: Any, handler: ModelWrapValidatorHandler[Body]) -> Body:
        made = handler(data)
        if isinstance(data, dict):
            made._said = {name: data[name] for name in FIELDS if name in data}
        return made

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
                        "{field} is not supported by this server; leave it out",
                        {"field": name},
                    )
            elif name not in _IDENTITY:
                hint = str(unknown_name("parameter", str(name), cls.model_fields))
                raise PydanticCustomError(
                    "unknown_parameter", "{hint}", {"field": str(name), "hint": hint}
                )
        return kept

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        for key, value in (given or {}).items():
            if not (key.isascii() and key.isdigit()) or not -100 <= value <= 100:
                raise invalid("logit_bias", "logit_bias maps token ids to numbers from -100 to 100")
        return given

    @model_validator(mode="after")
    def _agree(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options needs stream to be true")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4 or not all(stops):
            raise invalid("stop", "stop takes up to 4 non-empty strings")
        limit = self.limit()
        if limit is not None and (self.min_tokens or 0) > limit:
            raise invalid("min_tokens", f"min_tokens is above the limit of {limit} tokens")
        self.structured()
        return self

    @property
    def said(self) -> dict[str, Any]:
        """What the body says of the program that its call belongs to."""
        return self._said

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def limit(self) -> int | None:
        """Return the most tokens to generate; None up to the context."""
        return self.max_tokens if self.max_tokens is not None else self._default_max_tokens

    def num_logprobs(self) -> int | None:
        """Return how many of the likeliest tokens to report, 0 for the chosen one, or None."""
        raise NotImplementedError

    def sampling(self, choice: int) -> SamplingParams:
        """Return how tokens of the given choice are drawn; OpenAI's default temperature is 1."""
        limit = self.limit()
        return SamplingParams(
            # Nothing to generate: one token is drawn, whose logits are there anyway, and not shown.
            max_tokens=limit if limit is None else max(1, limit),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=tuple((int(key), value) for key, value in (self.logit_bias or {}).items()),
            # Choices of one request differ, and each is repeatable.
            seed=None if self.seed is None else self.seed + choice,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            include_stop=bool(self.include_stop_str_in_output),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            logprobs=self.num_logprobs(),
            structured=self.structured(),
        )


class CompletionRequest(Body):
    """`POST /v1/completions`: text or token ids in, text out."""

    _default_max_tokens: ClassVar[int | None] = 16  # OpenAI's

    prompt: str | list[int] | list[str] | list[list[int]] = Field(min_length=1)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _generate_something(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens", "max_tokens of 0 leaves nothing to say without echo")
        return self

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def sampling(self, choice: int) -> SamplingParams:
        """As for any body; what is echoed is scored too."""
        found = super().sampling(choice)
        scored = self.logprobs if self.echo else None
        return replace(found, prompt_logprobs=scored)

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


def invalid(field: str, message: str) -> PydanticCustomError:
    """Return the error for a field whose value cannot be."""
    return PydanticCustomError("invalid_value", "{text}", {"field": field, "text": message})
