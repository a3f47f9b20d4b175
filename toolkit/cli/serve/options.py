"""The options of commands that load a model, and the settings they make."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.errors import UsageError
from toolkit.hardware.affinity import thread_environment, usable_cores
from toolkit.units import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from toolkit.serve.assemble import EngineSettings
    from toolkit.serve.split.settings import SplitSettings

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
Split = Annotated[
    str,
    typer.Option(
        help="Divide the cores between prefill and decode: off, fixed, or auto: whichever is "
        "predicted to lose less time, undivided included."
    ),
]
PrefillPart = Annotated[float, typer.Option(help="Prefill's part of the cores in a fixed split.")]
TbtTarget = Annotated[
    str,
    typer.Option(help="Time between tokens that auto keeps where it can; none for no promise."),
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="A file of `toolkit serve calibrate`; default where that writes it."),
]
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


def divided(
    split: str,
    prefill_part: float = 0.5,
    tbt_target: str = "none",
    calibration: Path | None = None,
) -> SplitSettings:
    """Return how the device is divided. Raises UsageError."""
    from toolkit.serve.split.settings import SplitSettings

    target_s = None if tbt_target == "none" else parse_seconds(tbt_target)
    return SplitSettings(split, prefill_part, target_s, calibration)


def kept(model: str, quantize: str, threads: int | None) -> Path | None:
    """Return the model's calibration where `toolkit serve calibrate` keeps it, if there is one."""
    from toolkit.serve.split.calibration import default_path

    path = default_path(model, quantize, threads or usable_cores())
    return path if path.is_file() else None
