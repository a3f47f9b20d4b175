"""The load client's own HTTP: answers as they may come over a wire, and what goes wrong there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from toolkit.serve.bench.client import Record, Target, ask
from toolkit.serve.bench.exchange import on_a_loop

EVENTS = (
    b'data: {"choices": [{"text": "caf\xc3\xa9"}], "usage": null}\r\n\r\n'
    b': a comment\n\ndata:{"choices":[{"delta":{"content":" au lait"}}]}\n\n'
    b'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\ndata: [DONE]\n\n'
)
LENGTH = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(EVENTS)
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
UNTIL_CLOSED = b"HTTP/1.0 200 OK\r\n\r\n"


def told(sent: Sequence[bytes], timeout_s: float = 20.0, silent: bool = False) -> Record:
    """Return what a client hears of a server that sends `sent`, piece by piece."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b'"include_usage": true}}')
        for piece in sent:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)
        if silent:
            await reader.read()
        writer.close()

    async def play() -> Record:
        async with await asyncio.start_server(serve, "127.0.0.1") as server:
            host, port = server.sockets[0].getsockname()
            target = Target(f"http://{host}:{port}/v1", "tiny", timeout_s=timeout_s)
            return await ask(target, target.body("a", 3))

    return on_a_loop(play())


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


@pytest.mark.parametrize(
    "sent",
    [
        [LENGTH, EVENTS],
        [LENGTH + EVENTS],
        [LENGTH, *(EVENTS[at : at + 7] for at in range(0, len(EVENTS), 7))],
        [CHUNKED, *(chunk(EVENTS[at : at + 11]) for at in range(0, len(EVENTS), 11)), b"0\r\n\r\n"],
        [UNTIL_CLOSED, EVENTS],
    ],
    ids=["length", "at once", "torn", "chunked", "until closed"],
)
def test_answers_however_they_come(sent: list[bytes]) -> None:
    record = told(sent)
    assert (record.text, record.error) == ("café au lait", None)
    assert record.usage == {"completion_tokens": 5}
    assert len(record.piece_s) == 2
    assert record.piece_s[0] <= record.piece_s[1]


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ([b"HTTP/1.1 429 Busy\r\ncontent-length: 2\r\n\r\n{}"], "HTTP 429"),
        ([LENGTH, EVENTS[:70]], "ConnectionResetError"),
        ([CHUNKED, chunk(EVENTS)], "ConnectionResetError"),
        ([], "ConnectionResetError"),
        ([b"SSH-2.0-OpenSSH\r\n"], "HttpParserError"),
        ([UNTIL_CLOSED, b"data: {torn\n\n"], "JSONDecodeError"),
        ([UNTIL_CLOSED, b'data: {"error": {"code": "dead"}}\n\n'], "dead"),
        ([UNTIL_CLOSED, b"data: [DONE]\n\n"], "nothing came"),
    ],
)
def test_what_goes_wrong_is_named(sent: list[bytes], error: str) -> None:
    assert told(sent).error == error


def test_an_answer_that_does_not_end_is_given_up() -> None:
    assert told([CHUNKED, chunk(EVENTS)], timeout_s=0.2, silent=True).error == "TimeoutError"
