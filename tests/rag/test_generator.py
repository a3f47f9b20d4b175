"""OpenAIGenerator against a small server that streams, fails, stalls and hangs up."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from toolkit.errors import UsageError
from toolkit.rag import EndpointError, OpenAIGenerator

MESSAGES = [{"role": "user", "content": "Hello?"}]


def _event(text: str, finish: str | None = None) -> bytes:
    body = {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    behaviour = "ok"
    requests: ClassVar[list[dict[str, Any]]] = []
    released: ClassVar[threading.Event] = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *args: Any) -> None:
        pass

    def _reply(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        models = [] if self.server.behaviour == "no models" else [{"id": "first"}, {"id": "second"}]
        self._reply(200, json.dumps({"data": models}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(
            {"path": self.path, "key": self.headers.get("Authorization"), **body}
        )
        events = {
            "ok": b": hello\n\n" + _event("Hel") + _event("lo", None) + _event("", "stop")
            + b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n',
            "no done": _event("Hello") + _event("", "length"),
            "cut": _event("Hel"),
            "garbage": _event("Hel") + b"data: {half\n\n",
            "error event": _event("Hel") + b'data: {"error": {"message": "out of memory"}}\n\n',
        }  # fmt: skip
        behaviour = self.server.behaviour
        if behaviour in events:
            self._reply(200, events[behaviour], "text/event-stream")
        elif behaviour == "slow":
            self._reply(200, _event("Hel"), "text/event-stream")
            self.wfile.flush()
            self.server.released.wait(20)
        else:
            status, _, text = behaviour.partition(" ")
            self._reply(int(status), text.encode())


@pytest.fixture
def server() -> Iterator[_Server]:
    made = _Server(("127.0.0.1", 0), _Handler)
    made.requests.clear()
    made.released.clear()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.released.set()
    made.shutdown()
    thread.join()
    made.server_close()


def _generator(server: _Server, **how: Any) -> OpenAIGenerator:
    return OpenAIGenerator(f"http://127.0.0.1:{server.server_port}", **how)


def _say(generator: OpenAIGenerator) -> list[str]:
    return list(generator.stream(MESSAGES, max_tokens=7))


def test_a_reply_is_streamed(server: _Server) -> None:
    assert _say(_generator(server, api_key="secret")) == ["Hel", "lo"]
    (request,) = server.requests
    assert request == {
        "path": "/v1/chat/completions",
        "key": "Bearer secret",
        "model": "first",
        "messages": MESSAGES,
        "max_tokens": 7,
        "temperature": 0,
        "stream": True,
    }


def test_the_key_comes_from_the_environment(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    _say(_generator(server, model="m"))
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    _say(_generator(server, model="m"))
    assert [request["key"] for request in server.requests] == [None, "Bearer from-env"]


def test_a_finish_reason_ends_a_stream_without_done(server: _Server) -> None:
    server.behaviour = "no done"
    assert _say(_generator(server, model="m")) == ["Hello"]


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("cut", "cut its reply short after 1 events; ask again"),
        ("garbage", "an event that is not JSON: '{half'"),
        ("error event", "failed while replying: out of memory"),
    ],
)
def test_a_broken_stream_is_an_error_after_what_came(
    server: _Server, behaviour: str, message: str
) -> None:
    server.behaviour = behaviour
    stream = _generator(server, model="m").stream(MESSAGES)
    assert next(stream) == "Hel"
    with pytest.raises(EndpointError, match=message):
        next(stream)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ('500 {"error": {"message": "boom"}}', "answered 500 Internal Server Error: boom"),
        ("502 <html>bad gateway</html>", "answered 502 Bad Gateway: <html>bad gateway"),
        ('401 {"detail": "no"}', "answered 401.*set OPENAI_API_KEY"),
        ('404 {"error": "no such model"}', "no such model; check the URL and the model's name"),
        ("429 ", "answered 429 Too Many Requests; it is busy"),
        ("307 ", "answered 307"),
    ],
)
def test_a_refusal_says_what_the_server_said(
    server: _Server, behaviour: str, message: str
) -> None:  # fmt: skip
    server.behaviour = behaviour
    with pytest.raises(EndpointError, match=message):
        _say(_generator(server, model="m"))


def test_silence_is_an_error(server: _Server) -> None:
    server.behaviour = "slow"
    stream = _generator(server, model="m", read_timeout_s=0.2).stream(MESSAGES)
    assert next(stream) == "Hel"
    with pytest.raises(EndpointError, match=r"was silent for 0\.2 s"):
        next(stream)


def test_a_server_without_models_asks_for_a_name(server: _Server) -> None:
    server.behaviour = "no models"
    with pytest.raises(EndpointError, match="lists no model; name one with --model"):
        _say(_generator(server))


def test_nobody_there(server: _Server) -> None:
    generator = _generator(server, model="m")
    server.shutdown()
    server.server_close()
    with pytest.raises(EndpointError, match="no model server answers at http"):
        _say(generator)


@pytest.mark.parametrize(
    ("url", "used"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/v1/", "http://h:1/v1"),
        ("https://h/api/v1/chat/completions", "https://h/api/v1"),
    ],
)
def test_urls_may_be_written_in_several_ways(url: str, used: str) -> None:
    assert OpenAIGenerator(url).url == used


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(UsageError, match="'localhost:8000' is no URL"):
        OpenAIGenerator("localhost:8000")
