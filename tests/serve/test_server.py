"""The HTTP server through the client people use, on a model small enough to hold and release."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from toolkit.serve.assemble import EngineSettings, build
from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.executor.cpu import CpuExecutor
from toolkit.serve.model.config import DecoderConfig
from toolkit.serve.model.loaded import LoadedModel, expected
from toolkit.serve.model.tokenizer import Tokenizer
from toolkit.serve.server.run import Server, bind
from toolkit.serve.server.service import Service
from toolkit.timeline import files

MODEL = "tiny"


class HeldExecutor(CpuExecutor):
    """Computes only while `gate` is set, and dies when told to."""

    gate: threading.Event
    dies = False

    def run(self, batch: Batch) -> StepResult:
        assert self.gate.wait(60)
        if self.dies:
            raise RuntimeError("the executor was killed")
        return super().run(batch)


@dataclass(frozen=True)
class Running:
    """A server in a thread of this process, and the ways to it."""

    url: str
    server: Server
    service: Service
    executor: HeldExecutor
    thread: threading.Thread

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        raise AssertionError(f"no metric {name} {labels}")


def tiny_model() -> LoadedModel:
    # 2 layers of 32, 4 heads over 2 key-value heads of 8; SmolLM2's vocabulary, for its tokenizer.
    config = DecoderConfig(
        "llama", 2, 32, 4, 2, 8, 48, 49_152, 4096, 1e-5, 10_000.0, tied_head=True
    )
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.3
        for name, shape in expected(config).items()
    }
    return LoadedModel(config, tensors, frozenset({2}))


@pytest.fixture
def start(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Running]]:
    monkeypatch.setattr("toolkit.serve.assemble.CpuExecutor", HeldExecutor)
    running: list[Running] = []

    def begin(*, drain_s: float = 5.0, **settings: Any) -> Running:
        settings = {"threads": 1, "kv_bytes": 2**24} | settings
        engine, executor = build(tiny_model(), EngineSettings(**settings))
        assert isinstance(executor, HeldExecutor)
        executor.gate = threading.Event()
        executor.gate.set()
        service = Service(engine, tokenizer, MODEL, 49_152)
        ready = threading.Event()
        listener = bind("127.0.0.1", 0)
        server = Server(service, drain_s=drain_s, on_ready=ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert ready.wait(30)
        port = listener.getsockname()[1]
        running.append(Running(f"http://127.0.0.1:{port}", server, service, executor, thread))
        return running[-1]

    yield begin
    for each in running:
        each.executor.gate.set()
        each.server.should_exit = True
        each.thread.join(30)
        assert not each.thread.is_alive()


@pytest.fixture
def served(start: Callable[..., Running]) -> Running:
    return start()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def ask(running: Running, **options: Any) -> Any:
    given = {"model": MODEL, "prompt": "Hello there", "max_tokens": 8, "temperature": 0.0}
    return running.client.completions.create(**(given | options))


def test_completions(served: Running, tokenizer: Tokenizer) -> None:
    found = ask(served)
    assert found.object == "text_completion"
    assert found.model == MODEL
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == len(tokenizer.encode("Hello there"))
    assert found.usage.completion_tokens == 8
    by_ids = ask(served, prompt=tokenizer.encode("Hello there"))
    assert by_ids.choices[0].text == found.choices[0].text
    assert ask(served, echo=True).choices[0].text == "Hello there" + found.choices[0].text


def test_several_prompts_and_choices(served: Running) -> None:
    drawn = {"temperature": 1.0, "seed": 5}
    found = ask(served, prompt=["a b c", "d e"], n=2, **drawn)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage.completion_tokens == 32
    again = ask(served, prompt=["d e", "a b c"], n=2, **drawn)
    texts = [choice.text for choice in found.choices]
    assert [choice.text for choice in again.choices] == texts[2:] + texts[:2]
    assert texts[0] != texts[1]
    assert ask(served, prompt="a b c", temperature=1.0, seed=77).choices[0].text != texts[0]


def test_streaming_gives_the_same_text_and_usage(served: Running) -> None:
    whole = ask(served, n=2, temperature=1.0, seed=1)
    stream = ask(
        served, n=2, temperature=1.0, seed=1, stream=True, stream_options={"include_usage": True}
    )
    texts, reasons, usage = ["", ""], ["", ""], None
    for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["length", "length"]
    assert usage == whole.usage


def test_chat(served: Running, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    options = {"model": MODEL, "messages": messages, "max_completion_tokens": 6, "temperature": 0.0}
    found = served.client.chat.completions.create(**options)
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert found.usage.prompt_tokens == len(tokenizer.chat(plain))
    assert found.choices[0].message.role == "assistant"
    chunks = list(served.client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == found.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_stop_string(served: Running) -> None:
    text = ask(served, max_tokens=24).choices[0].text
    stop = text[len(text) // 2 :][:3]
    found = ask(served, max_tokens=24, stop=[stop])
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < 24


def test_models(served: Running) -> None:
    assert [model.id for model in served.client.models.list()] == [MODEL]
    assert served.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 99}, "n:"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**6]}, "not in the vocabulary of 49152"),
        ({"prompt": "word " * 5000}, "tokens and the context is"),
        ({"logprobs": 3}, "logprobs is not supported"),
        ({"presence_penalty": 1.0}, "presence_penalty is not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"extra_body": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop takes up to 4"),
    ],
)
def test_bad_requests_are_refused(served: Running, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, **options)
    assert message in caught.value.message
    assert caught.value.type == "invalid_request_error"
    assert ask(served).choices


def test_what_asks_for_nothing_is_taken(served: Running) -> None:
    assert ask(served, presence_penalty=0, logit_bias={}, user="me", best_of=1, suffix=None)
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        served.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    with pytest.raises(openai.BadRequestError):
        served.client.chat.completions.create(
            model=MODEL, messages=[{"role": "tool", "content": "a", "tool_call_id": "1"}]
        )


def test_errors_have_openai_shape(served: Running) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(served, model="other")
    assert caught.value.code == "model_not_found"
    url, json_type = f"{served.url}/v1/completions", {"content-type": "application/json"}
    half_a_pair = b'{"model": "tiny", "prompt": "\\ud800"}'
    for content, message in ((b"{", "not valid JSON"), (half_a_pair, "not Unicode")):
        refused = httpx.post(url, content=content, headers=json_type)
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]
    for response in (httpx.get(f"{served.url}/nowhere"), httpx.get(f"{served.url}/v1/completions")):
        assert response.status_code in (404, 405)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_client_that_leaves_ends_generation(served: Running) -> None:
    stream = ask(served, max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    until(lambda: served.metric("vllm:num_requests_running") == 0)
    served.executor.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{served.url}/v1/completions",
            json={"model": MODEL, "prompt": "a", "max_tokens": 4000, "ignore_eos": True},
            timeout=httpx.Timeout(30, read=0.5),
        )
    served.executor.gate.set()
    aborted = {"finished_reason": "abort"}
    until(lambda: served.metric("vllm:request_success_total", **aborted) == 2)
    assert served.metric("vllm:generation_tokens_total") < 8000
    until(lambda: served.metric("vllm:kv_cache_usage_perc") == 0)


def test_a_full_queue_is_refused_and_health_answers(start: Callable[..., Running]) -> None:
    served = start(max_batch=1, max_queue=2)
    served.executor.gate.clear()
    held = []

    def hold() -> None:
        held.append(ask(served))

    threads = [threading.Thread(target=hold) for _ in range(3)]
    threads[0].start()
    until(lambda: served.metric("vllm:num_requests_running") == 1)
    for thread in threads[1:]:
        thread.start()
    until(lambda: served.service._worker.num_waiting == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(served)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.type == "rate_limit_error"
    # The engine is stuck in a step; health and metrics answer all the same.
    assert httpx.get(f"{served.url}/health", timeout=5).status_code == 200
    served.executor.gate.set()
    for thread in threads:
        thread.join(30)
    assert len(held) == 3


def test_a_step_that_hangs_shows_in_health(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.serve.server.service._WEDGED_S", 0.05)
    served = start()
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    served.executor.gate.clear()
    thread = threading.Thread(target=ask, args=(served,))
    thread.start()
    until(lambda: httpx.get(f"{served.url}/health").status_code == 503)
    served.executor.gate.set()
    thread.join(30)
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_dead_engine_is_told_to_everyone(start: Callable[..., Running]) -> None:
    served = start()
    served.executor.gate.clear()
    stream = ask(served, stream=True)
    served.executor.dies = True
    served.executor.gate.set()
    with pytest.raises(openai.APIError, match="the executor was killed"):
        list(stream)
    health = httpx.get(f"{served.url}/health")
    assert health.status_code == 503
    with pytest.raises(openai.InternalServerError, match="the engine has died"):
        ask(served)


def test_shutdown_lets_open_requests_finish(start: Callable[..., Running]) -> None:
    served = start()
    served.executor.gate.clear()
    with httpx.Client() as kept:
        assert kept.get(f"{served.url}/health").status_code == 200
        stream = ask(served, stream=True, max_tokens=20, extra_body={"ignore_eos": True})
        until(lambda: served.metric("vllm:num_requests_running") == 1)
        served.server.handle_exit(signal.SIGTERM, None)
        served.executor.gate.set()
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    served.thread.join(30)
    assert not served.thread.is_alive()
    with pytest.raises(openai.APIConnectionError):
        ask(served)


def test_shutdown_does_not_wait_for_ever(start: Callable[..., Running]) -> None:
    served = start(drain_s=1)
    served.executor.gate.clear()
    stream = ask(served, stream=True)
    until(lambda: served.metric("vllm:num_requests_running") == 1)
    served.server.handle_exit(signal.SIGTERM, None)
    with contextlib.suppress(openai.APIError, httpx.HTTPError):
        list(stream)
    served.executor.gate.set()
    served.thread.join(30)
    assert not served.thread.is_alive()


NAMES = """
prompt_tokens generation_tokens request_success num_preemptions num_requests_running
num_requests_waiting kv_cache_usage_perc time_to_first_token_seconds inter_token_latency_seconds
request_time_per_output_token_seconds e2e_request_latency_seconds request_queue_time_seconds
request_prefill_time_seconds request_decode_time_seconds request_inference_time_seconds
iteration_tokens_total request_prompt_tokens request_generation_tokens
"""


def test_metrics_carry_vllms_names(served: Running) -> None:
    ask(served)
    text = httpx.get(f"{served.url}/metrics").text
    families = {family.name for family in text_string_to_metric_families(text)}
    assert families >= {f"vllm:{name}" for name in NAMES.split()}
    assert served.metric("vllm:time_to_first_token_seconds_count") == 1
    assert served.metric("vllm:inter_token_latency_seconds_count") == 7
    assert served.metric("vllm:generation_tokens_total") == 8


def test_timeline_is_served(served: Running, tmp_path: Path) -> None:
    ask(served)
    path = tmp_path / "served.json"
    path.write_bytes(httpx.get(f"{served.url}/timeline").content)
    timeline = files.load(path)
    assert {track for track, _ in timeline.tracks} == {"prefill", "decode", "request 0"}
    assert len(timeline.on("decode", "measured")) >= 7


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Exception, match=f"port {port} of 127.0.0.1 is in use"):
            bind("127.0.0.1", port)
