"""`toolkit serve run`: a model behind an OpenAI-compatible URL."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit import log
from toolkit.cli import view
from toolkit.cli.serve.options import (
    BlockSize,
    Calibration,
    Device,
    Dtype,
    KvMemory,
    MaxBatch,
    MaxContext,
    Model,
    Plan,
    Policy,
    PrefillPart,
    PrefixCache,
    Quantize,
    Split,
    StepTokens,
    TbtTarget,
    Threads,
    divided,
    kept,
    settings,
)
from toolkit.errors import require, unknown_name
from toolkit.units import format_bytes, parse_bytes, parse_seconds

logger = log.get_logger(__name__)


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
    device: Device = "cpu",
    dtype: Dtype = "auto",
    plan: Plan = None,
    policy: Policy = "fcfs",
    split: Split = "off",
    prefill_part: PrefillPart = 0.5,
    tbt_target: TbtTarget = "60ms",
    calibration: Calibration = None,
    prefix_cache: PrefixCache = True,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = 256,
    max_queue_tokens: Annotated[
        int | None, typer.Option(help="Prompt tokens that may wait; more get 429.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Where requests without a seed take theirs.")] = 0,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key clients must send; repeatable. Also TOOLKIT_API_KEYS, by comma."),
    ] = None,
    max_body: Annotated[
        str, typer.Option(help="Largest body of a request; more get 413.")
    ] = "8MiB",
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="A page that may ask from a browser, or *; repeatable."),
    ] = None,
    log_requests: Annotated[
        bool, typer.Option(help="Log a line for each request: tokens and times, no text.")
    ] = False,
    tool_format: Annotated[
        str, typer.Option(help="How the model writes tool calls: auto, hermes or llama3_json.")
    ] = "auto",
    step_timeout: Annotated[
        str, typer.Option(help="A step that takes longer hangs, and the engine is replaced.")
    ] = "120s",
    drain: Annotated[str, typer.Option(help="Time open requests get on SIGTERM.")] = "30s",
    as_json: view.Json = False,
) -> None:
    """Serve a model: completions, chat, embeddings, tokens, health, metrics; a live page at /.

    Prints where the engine's threads are pinned, what the KV cache holds, and the URL. With
    --json, one line when ready. SIGTERM (or Ctrl-C) lets open requests finish.

    Example: toolkit serve run smollm2-135m --port 8000
    """
    chosen = settings(
        threads=threads,
        kv_memory=kv_memory,
        max_batch=max_batch,
        step_tokens=step_tokens,
        block_size=block_size,
        max_context=max_context,
        pin=pin,
        quantize=quantize,
        device=device,
        dtype=dtype,
        plan=plan,
        policy=policy,
        split=divided(
            split, prefill_part, tbt_target, calibration or kept(model, quantize, threads)
        ),
        prefix_cache=prefix_cache,
        max_queue=max_queue,
        max_queue_tokens=max_queue_tokens,
        seed=seed,
    )
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, extra="serve")
    from toolkit.serve.assemble import assemble
    from toolkit.serve.server import run as server
    from toolkit.serve.server.app import Doorkeeping
    from toolkit.serve.server.service import Patience, Service
    from toolkit.serve.server.tool_calls import FORMATS

    if tool_format not in ("auto", *FORMATS):
        raise unknown_name("format of tool calls", tool_format, ("auto", *FORMATS))
    keys = [*(api_key or ()), *os.environ.get("TOOLKIT_API_KEYS", "").split(",")]
    door = Doorkeeping(
        tuple(key.strip() for key in keys if key.strip()),
        parse_bytes(max_body),
        tuple(cors_origin or ()),
        log_requests,
    )
    drain_s, replace_s = parse_seconds(drain), parse_seconds(step_timeout)
    listener = server.bind(host, port)
    with view.progress(quiet=as_json) as bar:
        bar.add_task(f"loading {model}", total=None)
        assembly = assemble(model, chosen)
    served = name or served_name(model)
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

    service = Service(
        assembly.engine,
        assembly.tokenizer,
        served,
        assembly.vocab_size,
        patience=Patience(replace_s / 2, replace_s),
        tool_format=None if tool_format == "auto" else tool_format,
    )
    if split == "auto" and chosen.split.calibration is None:
        logger.warning(
            "not calibrated: where to divide is decided on default coefficients, corrected by "
            "what steps take; `toolkit serve calibrate` measures this machine"
        )
    server.Server(service, drain_s=drain_s, on_ready=announce, door=door).run(sockets=[listener])


def served_name(model: str) -> str:
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
        (
            "split",
            f"{ready['split']}: {', '.join(ready['layouts'])}" if ready["layouts"] else "off",
        ),
    ]
    return view.table("toolkit serve", ("what", "value"), rows)
