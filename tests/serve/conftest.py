"""Models under test: SmolLM2 from its GGUF, and small random ones of each architecture."""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from toolkit.serve.assemble import EngineSettings, build
from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.engine import Engine
from toolkit.serve.executor.cpu import CpuExecutor
from toolkit.serve.executor.device import Place
from toolkit.serve.model import weights
from toolkit.serve.model.decoder import Decoder
from toolkit.serve.model.loaded import LoadedModel
from toolkit.serve.model.native import NativeDecoder
from toolkit.serve.model.quantisation import make_decoder
from toolkit.serve.model.tokenizer import Tokenizer
from toolkit.serve.server.app import Doorkeeping
from toolkit.serve.server.run import Server, bind
from toolkit.serve.server.service import Patience, Service

sys.path.append(str(Path(__file__).parent))
from tiny_models import tiny_model

MODEL = "tiny"
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


class Recorded(TorchDispatchMode):
    """A CUDA graph as a CPU can have one: calls into ATen, made again over the same memory.

    As there, Python is not run again, and nothing may look at a number on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was looked at"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def record(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self:
            return compute()

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


# A GPU's executor on the CPU: its reference kernels, and recordings that are played back.
FAKE_GPU = Place(torch.device("cpu"), torch.float32, lambda: 2**24, Recorded)


@pytest.fixture
def fake_gpu() -> Place:
    return FAKE_GPU


class HeldExecutor(CpuExecutor):
    """Computes only while `gate` is set, and dies when told to."""

    gate: threading.Event
    faults: list[str]

    def run(self, batch: Batch) -> StepResult:
        assert self.gate.wait(60)
        if self.faults:
            raise RuntimeError(self.faults.pop())
        return super().run(batch)


@dataclass(frozen=True)
class Running:
    """A server in a thread of this process, and the ways to it."""

    url: str
    server: Server
    service: Service
    executor: Any
    thread: threading.Thread

    @functools.cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        raise AssertionError(f"no metric {name} {labels}")

    def ask(self, **options: Any) -> Any:
        given = {"model": MODEL, "prompt": "Hello there", "max_tokens": 8, "temperature": 0.0}
        return self.client.completions.create(**(given | options))

    @staticmethod
    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.01)


@pytest.fixture
def start(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Running]]:
    monkeypatch.setattr("toolkit.serve.assemble.CpuExecutor", HeldExecutor)
    running: list[Running] = []

    def begin(
        *,
        drain_s: float = 5.0,
        patience: Patience | None = None,
        door: Doorkeeping | None = None,
        **settings: Any,
    ) -> Running:
        settings = {"threads": 1, "kv_bytes": 2**24} | settings
        engine, executor = build(tiny_model(), EngineSettings(**settings))
        if isinstance(executor, HeldExecutor):  # a divided engine computes in another
            executor.gate = threading.Event()
            executor.gate.set()
            executor.faults = []
        service = Service(engine, tokenizer, MODEL, 49_152, patience=patience)
        ready = threading.Event()
        listener = bind("127.0.0.1", 0)
        server = Server(service, drain_s=drain_s, on_ready=ready.set, door=door)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert ready.wait(30)
        port = listener.getsockname()[1]
        running.append(Running(f"http://127.0.0.1:{port}", server, service, executor, thread))
        return running[-1]

    yield begin
    for each in running:
        if isinstance(each.executor, HeldExecutor):
            each.executor.gate.set()
        each.server.should_exit = True
        each.thread.join(30)
        assert not each.thread.is_alive()


@pytest.fixture
def served(start: Callable[..., Running]) -> Running:
    return start()
