"""`toolkit serve batch`: OpenAI batch files, answered here or by a server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli import view
from toolkit.cli.serve.options import (
    Device,
    Dtype,
    KvMemory,
    MaxBatch,
    MaxContext,
    Plan,
    Policy,
    Quantize,
    StepTokens,
    Threads,
    settings,
)
from toolkit.cli.serve.run import served_name
from toolkit.errors import UsageError, require

if TYPE_CHECKING:
    import httpx

    from toolkit.serve.assemble import EngineSettings


def batch(
    model: Annotated[
        str, typer.Argument(help="A model as for `run`, loaded here; or a server's URL.")
    ],
    source: Annotated[
        Path, typer.Argument(help="OpenAI's batch input: JSON lines.", exists=True, dir_okay=False)
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Answers, appended to if there.")],
    name: Annotated[str | None, typer.Option(help="Name the requests give the model.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests open at once; default twice the batch.")
    ] = None,
    max_batch: MaxBatch = 32,
    step_tokens: StepTokens = 256,
    kv_memory: KvMemory = None,
    max_context: MaxContext = None,
    threads: Threads = None,
    quantize: Quantize = "none",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    plan: Plan = None,
    policy: Policy = "fcfs",
    as_json: view.Json = False,
) -> None:
    """Answer a file of requests to /v1/completions, /v1/chat/completions and /v1/embeddings.

    Killed and started again, it goes on where it was: what the output answers is not asked again.

    Example: toolkit serve batch smollm2-135m requests.jsonl -o answers.jsonl
    """
    for module in ("httpx", "fastapi"):
        require(module, extra="serve")
    from toolkit.serve import jobs

    if output.resolve() == source.resolve():
        raise UsageError(f"{output} is the input", remedy="name another file for the answers")
    listed = jobs.read(source)
    chosen = settings(
        threads=threads,
        kv_memory=kv_memory,
        max_batch=max_batch,
        step_tokens=step_tokens,
        max_context=max_context,
        quantize=quantize,
        device=device,
        dtype=dtype,
        plan=plan,
        policy=policy,
    )
    before = jobs.answered(output)
    left = len(listed) - len(before.keys() & {job.custom_id for job in listed})

    async def work() -> jobs.Tally:
        with view.progress(quiet=as_json) as bar:
            task = bar.add_task(f"loading {model}" if left else "nothing is left", total=left)
            if not left:
                return jobs.Tally(len(listed), 0, sum(not well for well in before.values()))
            async with _client(model, name, chosen) as client:
                bar.update(task, description=f"{left} requests")
                return await jobs.run(
                    client,
                    listed,
                    output,
                    concurrency=concurrency or 2 * max_batch,
                    on_done=lambda: bar.advance(task),
                )

    tally = asyncio.run(work())
    body = {"output": str(output), "num_jobs": len(listed)} | asdict(tally)
    view.emit(
        body,
        as_json=as_json,
        render=lambda: (
            f"{tally.num_now} answered, {tally.num_before} were before; "
            f"{tally.num_failed} with an error: {output}"
        ),
    )


@asynccontextmanager
async def _client(
    model: str, name: str | None, chosen: EngineSettings
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of the server named, or of one in this process that is on no network."""
    import httpx

    if model.startswith(("http://", "https://")):
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        base = model.rstrip("/").removesuffix("/v1")
        async with httpx.AsyncClient(base_url=base, headers=headers, timeout=None) as client:
            yield client
        return
    from toolkit.serve.assemble import assemble
    from toolkit.serve.server import app
    from toolkit.serve.server.service import Service

    assembly = assemble(model, chosen)
    served = name or served_name(model)
    service = Service(assembly.engine, assembly.tokenizer, served, assembly.vocab_size)
    service.start()
    try:
        transport = httpx.ASGITransport(app.create(service))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://batch", timeout=None
        ) as client:
            yield client
    finally:
        await asyncio.to_thread(service.stop)
