"""What clients may ask of a text's form: OpenAI's `response_format`, and vLLM's names for it."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from toolkit.serve.structured import Structured

_OBJECT = Structured("json", json.dumps({"type": "object"}))


class JsonSchema(BaseModel):
    """A named schema, as OpenAI takes it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's way to say it; `regex` is an addition of this server's."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: str | None = None

    def wanted(self) -> Structured | None:
        """Return the constraint, or None for free text."""
        if self.type == "json_schema":
            if self.json_schema is None or self.json_schema.schema_ is None:
                raise _error("response_format", "a json_schema needs its schema")
            return Structured("json", json.dumps(self.json_schema.schema_))
        if self.type == "regex":
            if self.regex is None:
                raise _error("response_format", "a regex needs its pattern")
            return Structured("regex", self.regex)
        return _OBJECT if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """vLLM's way to say it; exactly one is given."""

    model_config = ConfigDict(extra="forbid")

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None

    def wanted(self) -> Structured:
        """Return the constraint. Raises where none, or several, are given."""
        found = []
        if self.json_ is not None:
            found.append(_schema(self.json_))
        if self.regex is not None:
            found.append(Structured("regex", self.regex))
        if self.choice is not None:
            found.append(Structured("regex", "|".join(map(_literal, self.choice))))
        if self.grammar is not None:
            found.append(Structured("grammar", self.grammar))
        if self.json_object:
            found.append(_OBJECT)
        if len(found) != 1:
            raise _error("structured_outputs", f"{len(found)} constraints are given, 1 is needed")
        return found[0]


class Constrained(BaseModel):
    """The fields of a request that constrain its text."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # What vLLM called them before.
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    guided_grammar: str | None = None

    def structured(self) -> Structured | None:
        """Return the constraint on the text, or None. Raises where several are given."""
        older = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        found = []
        if any(value is not None for value in older.values()):
            found.append(StructuredOutputs.model_validate(older).wanted())
        if self.structured_outputs is not None:
            found.append(self.structured_outputs.wanted())
        if self.response_format is not None and (wanted := self.response_format.wanted()):
            found.append(wanted)
        if len(found) > 1:
            raise _error("response_format", "several constraints are given, at most 1 is possible")
        return found[0] if found else None


def _schema(given: str | dict[str, Any]) -> Structured:
    return Structured("json", given if isinstance(given, str) else json.dumps(given))


def _literal(text: str) -> str:
    return re.sub(r"([^A-Za-z0-9_\s])", r"\\\1", text)


def _error(field: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", "{text}", {"field": field, "text": message})
