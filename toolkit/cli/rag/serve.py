"""toolkit rag serve: answers from an index over HTTP, with a page to ask on."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from toolkit.cli import view
from toolkit.cli.rag import ask, options


def serve(
    index: options.Index,
    *,
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server. [default: in this process]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to answer with.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8010,
    at_once: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds of silence a server may take.")] = 120.0,
    memory: options.Memory = options.MEMORY,
    threads: options.Threads = 1,
    as_json: view.Json = False,
) -> None:
    """Answer questions over HTTP: a page at /, streams at /ask, passages at /search, /metrics.

    The index may be added to meanwhile. With a model in this process, one question is answered at a
    time.

    Example: toolkit rag serve runs/docs --url http://localhost:8000
    """
    import socket

    from toolkit.errors import ToolkitError, require
    from toolkit.rag import service as serving

    uvicorn = require("uvicorn", extra="serve")
    retriever = options.open_index(index, threads, memory)
    speaker = ask.generator(url, model, timeout)
    service = serving.Service(retriever, speaker, most_at_once=at_once if url else 1)
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        raise ToolkitError(
            f"cannot listen on {host}:{port}: {error.strerror}", remedy="choose another --port"
        ) from error
    where = f"http://{host}:{listening.getsockname()[1]}"
    if as_json:
        sys.stdout.write(json.dumps({"url": where, "index": str(index)}) + "\n")
        sys.stdout.flush()
    else:
        view.out.print(f"answering from {index} at {where}", markup=False)
    server = uvicorn.Server(uvicorn.Config(serving.create(service), log_level="warning"))
    try:
        server.run(sockets=[listening])
    finally:
        service.close()
