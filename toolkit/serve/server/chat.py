"""What clients send to be answered: OpenAI's conversations, with their tools."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from toolkit.serve.server.protocol import Body, invalid
from toolkit.serve.structured import Structured


class ContentPart(BaseModel):
    """A piece of a message; only text is understood."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """What the assistant called: a name, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def plain(self) -> dict[str, Any]:
        """Return the call as chat templates take it: arguments as an object."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except ValueError:
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_alone(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in (None, "text"):
                raise invalid("messages", f"content of type {kind!r} is not supported, only text")
        return content

    @model_validator(mode="after")
    def _say_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise invalid("messages", f"a message of role {self.role!r} needs content")
        if self.tool_calls and self.role != "assistant":
            raise invalid("messages", "only the assistant calls tools")
        if self.role == "tool" and self.tool_call_id is None:
            raise invalid("messages", "a tool's answer needs its tool_call_id")
        return self

    def plain(self) -> dict[str, Any]:
        """Return the turn as chat templates take it; `developer` is a newer word for system."""
        role = "system" if self.role == "developer" else self.role
        text = self.content or ""
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        turn: dict[str, Any] = {"role": role, "content": text}
        if self.name:
            turn["name"] = self.name
        if self.tool_calls:
            turn["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id:
            turn["tool_call_id"] = self.tool_call_id
        return turn


class Function(BaseModel):
    """A function the model may call; `parameters` is a JSON schema."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        return self.parameters or {"type": "object", "properties": {}}


class Tool(BaseModel):
    """A tool; only functions exist."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """The name of the function to call."""

    name: str


class NamedTool(BaseModel):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Body):
    """`POST /v1/chat/completions`: a conversation in, the assistant's turn out."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # vLLM's: passed on to the chat template.
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _tools_agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise invalid("tools", "two tools have the same name")
        if self.forced is None:
            return self
        if not names:
            raise invalid("tool_choice", "tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.forced not in names:
            raise invalid("tool_choice", f"no tool is named {self.forced!r}")
        if super().structured() is not None:
            raise invalid("tool_choice", "a forced tool call leaves no room for another format")
        return self

    @property
    def forced(self) -> str | None:
        """The function that must be called, "" for any of them, None where the model decides."""
        if isinstance(self.tool_choice, NamedTool):
            return self.tool_choice.function.name
        return "" if self.tool_choice == "required" else None

    @property
    def offered(self) -> list[Tool]:
        """The tools the model is told of."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    def limit(self) -> int | None:
        """Return the most tokens to generate; the newer name wins."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return super().limit()

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def structured(self) -> Structured | None:
        """Return the constraint on the text: the arguments of a forced call are one.

        One named function writes its arguments alone; any of several a list of calls.
        """
        if self.forced is None or not self.tools:
            return super().structured()
        functions = [tool.function for tool in self.tools]
        if self.forced:
            (chosen,) = [each for each in functions if each.name == self.forced] or functions[:1]
            return Structured("json", json.dumps(chosen.schema_of_arguments))
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": each.name},
                    "arguments": each.schema_of_arguments,
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for each in functions
        ]
        most = {"maxItems": 1} if self.parallel_tool_calls is False else {}
        return Structured(
            "json", json.dumps({"type": "array", "items": {"anyOf": calls}, "minItems": 1} | most)
        )
