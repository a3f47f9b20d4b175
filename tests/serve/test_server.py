"""The HTTP server through the client people use, on a model small enough to hold and release."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from toolkit.serve.model.tokenizer import Tokenizer
from toolkit.serve.server.run import bind
from toolkit.serve.server.service import Patience
from toolkit.timeline import files

MODEL = "tiny"
Start = Callable[..., Any]


def test_completions(served: Any, tokenizer: Tokenizer) -> None:
    found = served.ask()
    assert found.object == "text_completion"
    assert found.model == MODEL
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == len(tokenizer.encode("Hello there"))
    assert found.usage.completion_tokens == 8
    by_ids = served.ask(prompt=tokenizer.encode("Hello there"))
    assert by_ids.choices[0].text == found.choices[0].text
    assert served.ask(echo=True).choices[0].text == "Hello there" + found.choices[0].text


def test_several_prompts_and_choices(served: Any) -> None:
    drawn = {"temperature": 1.0, "seed": 5}
    found = served.ask(prompt=["a b c", "d e"], n=2, **drawn)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage.completion_tokens == 32
    again = served.ask(prompt=["d e", "a b c"], n=2, **drawn)
    texts = [choice.text for choice in found.choices]
    assert [choice.text for choice in again.choices] == texts[2:] + texts[:2]
    assert texts[0] != texts[1]
    assert served.ask(prompt="a b c", temperature=1.0, seed=77).choices[0].text != texts[0]


def test_streaming_gives_the_same_text_and_usage(served: Any) -> None:
    whole = served.ask(n=2, temperature=1.0, seed=1)
    stream = served.ask(
        n=2, temperature=1.0, seed=1, stream=True, stream_options={"include_usage": True}
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


def test_chat(served: Any, tokenizer: Tokenizer) -> None:
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


def test_stop_string(served: Any) -> None:
    text = served.ask(max_tokens=24).choices[0].text
    stop = text[len(text) // 2 :][:3]
    found = served.ask(max_tokens=24, stop=[stop])
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < 24


def test_models(served: Any) -> None:
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
        (
            {"prompt": 5},
            "prompt: it should be a string, a list of integers, a list of strings "
            "or a list of lists of integers",
        ),
        ({"prompt": ["a", 5]}, "prompt: it should be a string, a list"),
        ({"stop": 5}, "stop: it should be a string or a list of strings"),
        ({"prompt": [10**6]}, "not in the vocabulary of 49152"),
        ({"prompt": "word " * 5000}, "tokens and the context is"),
        ({"logprobs": 21}, "logprobs"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"best_of": 3}, "best_of is not supported"),
        ({"logit_bias": {"the": 1}}, "logit_bias maps token ids"),
        ({"extra_body": {"min_tokens": 9}}, "min_tokens is above the limit of 8"),
        ({"extra_body": {"guided_regex": "(("}}, "regex constraint cannot be used"),
        ({"extra_body": {"guided_regex": "a", "guided_json": {}}}, "2 constraints are given"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"extra_body": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"extra_body": {"skip_special_tokens": False}}, "skip_special_tokens is not supported"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop takes up to 4"),
    ],
)
def test_bad_requests_are_refused(served: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.ask(**options)
    assert message in caught.value.message
    assert caught.value.type == "invalid_request_error"
    assert served.ask().choices


def test_a_prompt_too_long_has_a_code_of_its_own(served: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.ask(prompt="word " * 5000)
    assert caught.value.code == "context_length_exceeded"


def test_a_form_without_xgrammar_is_refused(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(openai.BadRequestError, match=r"pip install 'toolkit\[structured\]'"):
        served.ask(extra_body={"guided_regex": "a+"})
    assert served.ask().choices


def test_what_asks_for_nothing_is_taken(served: Any) -> None:
    assert served.ask(presence_penalty=0, logit_bias={}, user="me", best_of=1, suffix=None)
    vllms = {"skip_special_tokens": True, "length_penalty": 1.0, "use_beam_search": False}
    assert served.ask(extra_body=vllms)
    with pytest.raises(openai.BadRequestError, match="reasoning_effort is not supported"):
        served.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "a"}], reasoning_effort="high"
        )
    with pytest.raises(openai.BadRequestError):
        served.client.chat.completions.create(
            model=MODEL, messages=[{"role": "tool", "content": "a"}]
        )


def test_errors_have_openai_shape(served: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        served.ask(model="other")
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
    assert response.headers["allow"] == "POST"


def test_a_client_that_leaves_ends_generation(served: Any) -> None:
    stream = served.ask(max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    served.until(lambda: served.metric("vllm:num_requests_running") == 0)
    served.executor.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{served.url}/v1/completions",
            json={"model": MODEL, "prompt": "a", "max_tokens": 4000, "ignore_eos": True},
            timeout=httpx.Timeout(30, read=0.5),
        )
    served.executor.gate.set()
    aborted = {"finished_reason": "abort"}
    served.until(lambda: served.metric("vllm:request_success_total", **aborted) == 2)
    assert served.metric("vllm:generation_tokens_total") < 8000
    served.until(lambda: served.metric("vllm:kv_cache_usage_perc") == 0)


def test_a_full_queue_is_refused_and_health_answers(start: Start) -> None:
    served = start(max_batch=1, max_queue=2)
    served.executor.gate.clear()
    held = []

    def hold() -> None:
        held.append(served.ask())

    threads = [threading.Thread(target=hold) for _ in range(3)]
    threads[0].start()
    served.until(lambda: served.metric("vllm:num_requests_running") == 1)
    for thread in threads[1:]:
        thread.start()
    served.until(lambda: served.service._worker.num_waiting == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        served.ask()
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.type == "rate_limit_error"
    assert served.metric("toolkit:http_responses_total", status="429") == 1
    # The engine is stuck in a step; health and metrics answer all the same.
    assert httpx.get(f"{served.url}/health", timeout=5).status_code == 200
    served.executor.gate.set()
    for thread in threads:
        thread.join(30)
    assert len(held) == 3


def test_a_step_that_hangs_shows_in_health(start: Start) -> None:
    served = start(patience=Patience(unhealthy_s=0.05))
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    served.executor.gate.clear()
    thread = threading.Thread(target=served.ask)
    thread.start()
    served.until(lambda: httpx.get(f"{served.url}/health").status_code == 503)
    served.executor.gate.set()
    thread.join(30)
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_shutdown_lets_open_requests_finish(start: Start) -> None:
    served = start()
    served.executor.gate.clear()
    with httpx.Client() as kept:
        assert kept.get(f"{served.url}/health").status_code == 200
        stream = served.ask(stream=True, max_tokens=20, extra_body={"ignore_eos": True})
        served.until(lambda: served.metric("vllm:num_requests_running") == 1)
        served.server.handle_exit(signal.SIGTERM, None)
        served.executor.gate.set()
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    served.thread.join(30)
    assert not served.thread.is_alive()
    with pytest.raises(openai.APIConnectionError):
        served.ask()


def test_shutdown_does_not_wait_for_ever(start: Start) -> None:
    served = start(drain_s=1)
    served.executor.gate.clear()
    stream = served.ask(stream=True)
    served.until(lambda: served.metric("vllm:num_requests_running") == 1)
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
prefix_cache_queries prefix_cache_hits
"""


def test_metrics_carry_vllms_names(served: Any) -> None:
    served.ask()
    text = httpx.get(f"{served.url}/metrics").text
    families = {family.name for family in text_string_to_metric_families(text)}
    assert families >= {f"vllm:{name}" for name in NAMES.split()}
    assert served.metric("vllm:time_to_first_token_seconds_count") == 1
    assert served.metric("vllm:inter_token_latency_seconds_count") == 7
    assert served.metric("vllm:generation_tokens_total") == 8


def test_timeline_is_served(served: Any, tmp_path: Path) -> None:
    served.ask()
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
