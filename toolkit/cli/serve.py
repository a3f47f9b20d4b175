"""`toolkit serve`: a model behind an OpenAI-compatible URL, or answering once, here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.cli import view
from toolkit.errors import UsageError, require
from toolkit.hardware.affinity import thread_environment, usable_cores
from toolkit.units import format_bytes, parse_bytes, parse_seconds

if TYPE_CHECKING:
    from toolkit.serve.assemble import EngineSettings

app = typer.Typer(
    help="Serve a model over an OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    epilog="Example: toolkit serve run smollm2-135m",
)

Model = Annotated[
    str, typer.Argument(help="A built-in name, a GGUF file, a Hugging Face folder or hub id.")
]
MaxBatch = Annotated[int, typer.Option(help="Requests computed at once.")]
StepTokens = Annotated[int, typer.Option(help="Tokens a step computes at most.")]
BlockSize = Annotated[int, typer.Option(help="Tokens in a KV block.")]
KvMemory = Annotated[
    str | None, typer.Option(help="Memory for the KV cache, e.g. 2GiB; default a quarter of free.")
]
MaxContext = Annotated[int | None, typer.Option(help="Longest prompt and output together.")]
Threads = Annotated[int | None, typer.Option(help="Threads to compute with; default every core.")]
Quantize = Annotated[
    str,
    typer.Option(
        help="Weights as none (float32), int8, int4, or auto: the fastest measured here that keeps "
        "the file's own precision or 8 bits."
    ),
]
Policy = Annotated[str, typer.Option(help="Which prompt goes first: fcfs or spf (shortest).")]


def _settings(*, threads: int | None, kv_memory: str | None, **given: Any) -> EngineSettings:
    """Return the engine's settings, and keep its thread pools to what was asked for."""
    if threads is not None and not 1 <= threads <= usable_cores():
        raise UsageError(
            f"{threads} threads were asked for and {usable_cores()} cores are usable",
            remedy=f"use 1 to {usable_cores()}",
        )
    # Read when torch is first imported, which is below; what the user has set stays.
    for name, value in thread_environment(threads or usable_cores()).items():
        os.environ.setdefault(name, value)
    from toolkit.serve.assemble import EngineSettings

    kv_bytes = None if kv_memory is None else parse_bytes(kv_memory)
    return EngineSettings(threads=threads, kv_bytes=kv_bytes, **given)


@app.command()
def run(
    model: Model,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name the API gives the model.")] = None,
    max_batch: MaxBatch = 32,
    step_tokens: StepTokens = 256,
    block_size: BlockSize = 16,
    kv_memory: KvMemory = None,
    max_context: MaxContext = None,
    threads: Threads = None,
    pin: Annotated[bool, typer.Option(help="Tie the engine's threads to cores.")] = True,
    quantize: Quantize = "none",
    policy: Policy = "fcfs",
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = 256,
    max_queue_tokens: Annotated[
        int | None, typer.Option(help="Prompt tokens that may wait; more get 429.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Where requests without a seed take theirs.")] = 0,
    drain: Annotated[str, typer.Option(help="Time open requests get on SIGTERM.")] = "30s",
    as_json: view.Json = False,
) -> None:
    """Serve a model: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

    Prints where the engine's threads are pinned, what the KV cache holds, and the URL. With
    --json, one line when ready. SIGTERM (or Ctrl-C) lets open requests finish.

    Example: toolkit serve run smollm2-135m --port 8000
    """
    settings = _settings(
        threads=threads,
        kv_memory=kv_memory,
        max_batch=max_batch,
        step_tokens=step_tokens,
        block_size=block_size,
        max_context=max_context,
        pin=pin,
        quantize=quantize,
        policy=policy,
        max_queue=max_queue,
        max_queue_tokens=max_queue_tokens,
        seed=seed,
    )
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, extra="serve")
    from toolkit.serve.assemble import assemble
    from toolkit.serve.server import run as server
    from toolkit.serve.server.service import Service

    drain_s = parse_seconds(drain)
    listener = server.bind(host, port)
    with view.progress(quiet=as_json) as bar:
        bar.add_task(f"loading {model}", total=None)
        assembly = assemble(model, settings)
    served = name or _served_name(model)
    shown = f"[{host}]" if ":" in host else host
    ready = {
        "url": f"http://{shown}:{listener.getsockname()[1]}",
        "model": served,
    } | assembly.layout()

    def announce() -> None:
        if as_json:
            # One line, so that whoever started this can wait for it.
            sys.stdout.write(json.dumps(ready) + "\n")
            sys.stdout.flush()
        else:
            view.out.print(_ready_table(ready))

    service = Service(assembly.engine, assembly.tokenizer, served, assembly.vocab_size)
    server.Server(service, drain_s=drain_s, on_ready=announce).run(sockets=[listener])


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or the question.")],
    *,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Makes drawn tokens repeatable.")] = 0,
    kv_memory: KvMemory = None,
    threads: Threads = None,
    quantize: Quantize = "none",
    as_json: view.Json = False,
) -> None:
    """Generate once in this process, without a server.

    Example: toolkit serve generate smollm2-135m "What is gravity?" --chat
    """
    settings = _settings(threads=threads, kv_memory=kv_memory, max_batch=1, quantize=quantize)
    from toolkit.serve.llm import LLM
    from toolkit.serve.request import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with view.progress(quiet=as_json) as bar:
        bar.add_task(f"loading {model}", total=None)
        llm = LLM(model, settings)

    def show(_: int, text: str) -> None:
        if not as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    if chat:
        found = llm.chat([{"role": "user", "content": prompt}], params, on_text=show)
    else:
        found = llm.generate(prompt, params, on_text=show)[0]
    usage = {"prompt_tokens": len(found.prompt_token_ids), "output_tokens": len(found.token_ids)}
    body = {
        "model": model,
        "text": found.text,
        "finish_reason": found.finish_reason,
        **usage,
        "latency_s": found.latency_s,
        "source": "measured",
    }
    view.emit(body, as_json=as_json, render=lambda: "")


def _served_name(model: str) -> str:
    """Return a name for the API: a file's or folder's own, else the reference as given."""
    path = Path(model).expanduser()
    return (path.stem if path.suffix == ".gguf" else path.name) if path.exists() else model


def _ready_table(ready: dict[str, Any]) -> Any:
    cores = ", ".join(map(str, ready["pinned_cpus"])) or "not pinned"
    rows = [
        ("URL", ready["url"]),
        ("model", ready["model"]),
        ("threads", f"{ready['threads']} (cores {cores})"),
        ("weights", f"{format_bytes(ready['weight_bytes'])}, {ready['dtype']}"),
        ("kernels", ready["kernels"]),
        (
            "KV cache",
            f"{format_bytes(ready['kv_bytes'])}: {ready['kv_blocks']} blocks of "
            f"{ready['block_size']}, {ready['kv_tokens']} tokens",
        ),
        ("context", f"{ready['max_context']} tokens"),
        ("batch", f"{ready['max_batch']} requests, {ready['step_tokens']} tokens a step"),
        ("policy", ready["policy"]),
    ]
    return view.table("toolkit serve", ("what", "value"), rows)
