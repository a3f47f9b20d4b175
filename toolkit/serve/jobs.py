"""OpenAI batch files: a request a line, an answer a line, taken up again where it was left."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from toolkit.errors import FormatError, ToolkitError

_URLS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
_RETRIED = frozenset({429, 502, 503})
_MOST_TRIES = 6


@dataclass(frozen=True)
class Job:
    """One line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Tally:
    """How a batch ended: answered before, answered now, and how many of all are errors."""

    num_before: int
    num_now: int
    num_failed: int


def read(path: Path) -> list[Job]:
    """Return a batch file's jobs. Raises FormatError, naming the line."""
    jobs: list[Job] = []
    seen: set[str] = set()
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            job = Job(str(row["custom_id"]), row["url"], dict(row["body"]))
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{where} is no request of a batch: {error!r}") from error
        if row.get("method", "POST") != "POST" or job.url not in _URLS:
            raise FormatError(
                f"{where} asks for {row.get('method')} {job.url}",
                remedy=f"POST to one of {', '.join(_URLS)}",
            )
        if job.body.get("stream"):
            raise FormatError(f"{where} asks to stream", remedy="leave stream out in a batch")
        if job.custom_id in seen:
            raise FormatError(f"{where} has the custom_id {job.custom_id!r} of an earlier line")
        seen.add(job.custom_id)
        jobs.append(job)
    return jobs


def answered(path: Path) -> dict[str, bool]:
    """Return which jobs an output file answers, and whether well.

    A last line torn by a kill is cut off, so that the file can be appended to.
    """
    if not path.exists():
        return {}
    found: dict[str, bool] = {}
    whole = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                found[row["custom_id"]] = row["error"] is None
            except (ValueError, KeyError, TypeError) as error:
                if line.endswith(b"\n"):
                    raise FormatError(
                        f"{path} is no output of a batch", remedy="name another file"
                    ) from error
                break
            if not line.endswith(b"\n"):
                found.pop(row["custom_id"])
                break
            whole += len(line)
    os.truncate(path, whole)
    return found


async def run(
    client: httpx.AsyncClient,
    jobs: Sequence[Job],
    output: Path,
    *,
    concurrency: int,
    on_done: Callable[[], None] = lambda: None,
) -> Tally:
    """Answer what `output` does not answer yet, appending a line as each is done.

    Jobs that are refused for want of room are sent again; other errors are their answer.
    """
    before = answered(output)
    left = [job for job in jobs if job.custom_id not in before]
    queue = iter(left)
    failed = sum(not well for well in before.values())
    with output.open("a", encoding="utf-8") as lines:

        async def worker() -> None:
            nonlocal failed
            for job in queue:
                row = await _answer(client, job)
                failed += row["error"] is not None
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                lines.flush()
                on_done()

        await asyncio.gather(*(worker() for _ in range(min(concurrency, len(left)))))
        os.fsync(lines.fileno())
    return Tally(len(jobs) - len(left), len(left), failed)


async def _answer(client: httpx.AsyncClient, job: Job) -> dict[str, Any]:
    for attempt in range(_MOST_TRIES):
        try:
            answer = await client.post(job.url, json=job.body)
        except httpx.HTTPError as error:
            if attempt + 1 == _MOST_TRIES:
                raise ToolkitError(f"the server does not answer: {type(error).__name__}") from error
            await asyncio.sleep(2**attempt)
            continue
        if answer.status_code not in _RETRIED or attempt + 1 == _MOST_TRIES:
            break
        await asyncio.sleep(float(answer.headers.get("retry-after", 2**attempt)))
    body = answer.json()
    well = answer.status_code == 200
    response = {"status_code": answer.status_code, "request_id": uuid.uuid4().hex, "body": body}
    wrong = None if well else {"code": body["error"]["code"], "message": body["error"]["message"]}
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": job.custom_id,
        "response": response,
        "error": wrong,
    }
