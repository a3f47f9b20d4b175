"""Models under test: SmolLM2 from its GGUF, and small random ones of each architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from toolkit.serve.assemble import EngineSettings, build
from toolkit.serve.engine import Engine
from toolkit.serve.model import weights
from toolkit.serve.model.decoder import Decoder
from toolkit.serve.model.loaded import LoadedModel
from toolkit.serve.model.native import NativeDecoder
from toolkit.serve.model.quantisation import make_decoder
from toolkit.serve.model.tokenizer import Tokenizer

MakeEngine = Callable[..., Engine]
SETTINGS = EngineSettings(kv_bytes=96 * 2**20, threads=1, max_context=1024)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference(smollm2_gguf: Path) -> Any:
    """transformers' model on the same dequantised weights, float32, eager attention."""
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent,
        gguf_file=smollm2_gguf.name,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return Tokenizer.load(smollm2_gguf)


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> tuple[LoadedModel, Decoder | NativeDecoder]:
    model = weights.load(smollm2_gguf)
    return model, make_decoder(model, "none")


@pytest.fixture
def make_engine(
    smollm2: tuple[LoadedModel, Decoder | NativeDecoder], monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeEngine]:
    """Build engines over SmolLM2's weights, loaded once: `make_engine(step_tokens=17)`."""
    model, decoder = smollm2
    monkeypatch.setattr("toolkit.serve.assemble.make_decoder", lambda *_: decoder)
    made: list[Engine] = []

    def make(**changes: Any) -> Engine:
        engine, _ = build(model, replace(SETTINGS, **changes))
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.scheduler.check_integrity()
        assert engine.scheduler.pool.num_used == 0, "blocks leaked"
