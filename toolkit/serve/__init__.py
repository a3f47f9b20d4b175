"""Nexus and Autellix: serve a model, phases and programs scheduled on a divided device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.serve.request import SamplingParams
from toolkit.serve.structured import Structured

if TYPE_CHECKING:
    from toolkit.serve.assemble import EngineSettings
    from toolkit.serve.llm import LLM

__all__ = ["LLM", "EngineSettings", "SamplingParams", "Structured"]


def __getattr__(name: str) -> Any:
    # Both bring torch; the scheduler, its policies and the simulator must not pay for it.
    if name == "LLM":
        from toolkit.serve.llm import LLM

        return LLM
    if name == "EngineSettings":
        from toolkit.serve.assemble import EngineSettings

        return EngineSettings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
