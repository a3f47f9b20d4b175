"""The options of commands that load a model, and the settings they make."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.errors import UsageError
from toolkit.hardware.affinity import thread_environment, usable_cores
from toolkit.units import parse_bytes

if TYPE_CHECKING:
    from toolkit.serve.assemble import EngineSettings

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
Device = Annotated[str, typer.Option(help="Where it runs: cpu or cuda.")]
Dtype = Annotated[
    str, typer.Option(help="Weights and arithmetic on cuda: auto, bfloat16, float16 or float32.")
]
Plan = Annotated[
    Path | None,
    typer.Option(help="A tensor-parallel plan.json: its degree of ranks share the model."),
]
Policy = Annotated[str, typer.Option(help="Which prompt goes first: fcfs, spf, priority or mlfq.")]
PrefixCache = Annotated[bool, typer.Option(help="Share the KV of equal beginnings of prompts.")]


def settings(*, threads: int | None, kv_memory: str | None, **given: Any) -> EngineSettings:
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
