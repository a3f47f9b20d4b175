"""The reference pages of serving name what there is: every field, route and metric."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from toolkit.serve.server import protocol
from toolkit.serve.server.chat import ChatRequest
from toolkit.serve.server.protocol import CompletionRequest, StreamOptions
from toolkit.serve.server.texts import DetokenizeRequest, EmbeddingRequest, TokenizeRequest

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
BODIES: tuple[type[BaseModel], ...] = (
    *(CompletionRequest, ChatRequest, StreamOptions),
    *(EmbeddingRequest, TokenizeRequest, DetokenizeRequest),
)


def test_the_api_page_names_every_field_and_route(served: Any) -> None:
    page = (REFERENCE / "serving-api.md").read_text("utf-8")
    words = re.findall(r"[\w./]+", " ".join(re.findall(r"`([^`]+)`", page)))
    told = {part for word in words for part in (word, *word.split("."))}
    fields = {name for body in BODIES for name in body.model_fields}
    assert fields | set(protocol._UNSUPPORTED) | set(protocol._IDENTITY) <= told
    routes = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert {re.sub(r"\{.*", "NAME", route) for route in routes} <= told


def test_the_metrics_page_names_every_metric(served: Any) -> None:
    page = (REFERENCE / "serving-metrics.md").read_text("utf-8")
    text = httpx.get(f"{served.url}/metrics").text
    # Beside each counter the client library tells when it was made.
    names = {
        family.name.partition(":")[2]
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    }
    assert {name for name in names if not re.search(rf"`{name}(_total)?\b", page)} == set()
