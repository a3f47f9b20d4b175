#!/usr/bin/env python
"""The serving kernels against this machine's limits: decode, prefill, a batch of requests, quality.

    python recipes/bench/serve_kernels.py smollm2-135m --quantize none int8 int4

Limits (memory read, float32 GEMM of torch) are measured in the same run. `gb_s` counts the weights
and the KV that a step reads, once each; `gflop_s` two operations per weight and row plus
attention's.
Timings need a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.serve.model.native import NativeDecoder

_CONTEXT = 192
_BLOCK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--quantize", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--prefill", type=int, default=1024, help="prompt tokens; 0 leaves it out")
    parser.add_argument("--requests", type=int, default=32, help="of 128 in, 128 out; 0: none")
    parser.add_argument("--quality", type=int, default=4096, help="tokens of held text; 0: none")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each decode and prefill")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = {"limits": limits(options.threads)}
    show("limits", found["limits"])
    for mode in options.quantize:
        found[mode] = measured(mode, options, found["limits"])
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


def limits(threads: int | None) -> dict[str, float]:
    """Measure what the machine does at most, in its own units a second."""
    import torch

    from toolkit.hardware.affinity import usable_cores
    from toolkit.hardware.probe import gemm, memory

    torch.set_num_threads(threads or usable_cores())
    return {
        "threads": torch.get_num_threads(),
        "read_gb_s": memory.read_bandwidth(2**29, budget_s=1.5) / 1e9,
        "float32_gflop_s": gemm.flops("float32", (1024, 2048), budget_s=1.5) / 1e9,
    }


def measured(mode: str, options: argparse.Namespace, limit: dict[str, float]) -> dict[str, Any]:
    """Return everything asked for about one weight format."""
    from toolkit.models import weights as files
    from toolkit.serve.assemble import EngineSettings, assemble

    start = time.perf_counter()
    settings = EngineSettings(
        quantize=mode, threads=options.threads, kv_bytes=2**30, max_context=2048
    )
    assembly = assemble(files.resolve(options.model).path, settings)
    decoder: NativeDecoder = assembly.executor.decoder  # type: ignore[assignment]
    assembly.executor.start()
    found: dict[str, Any] = {
        "kernels": decoder.kernels,
        "load_s": time.perf_counter() - start,
        "weight_mb": decoder.weight_bytes / 1e6,
    }
    show(mode, found)
    for batch in options.batches:
        found[f"decode_{batch}"] = decode(decoder, batch, options.seconds, limit)
        show(f"{mode} decode {batch}", found[f"decode_{batch}"])
    if options.prefill:
        found["prefill"] = prefill(decoder, options.prefill, options.seconds, limit)
        show(f"{mode} prefill {options.prefill}", found["prefill"])
    if options.requests:
        found["requests"] = requests(assembly.engine, options.requests)
        show(f"{mode} {options.requests} x (128, 128)", found["requests"])
    if options.quality:
        from toolkit.serve.model.quality import held_text, mean_nll

        ids = assembly.tokenizer.encode(held_text()[: 8 * options.quality])[: options.quality]
        nll = mean_nll(decoder, ids)
        found["quality"] = {"nll": nll, "perplexity": math.exp(nll), "tokens": len(ids)}
        show(f"{mode} quality", found["quality"])
    return found


def work(decoder: Any, rows: int, samples: int, context: float) -> tuple[float, float]:
    """Return operations and bytes of a step: weights once, the context's KV once a sequence."""
    config = decoder.config
    attention = config.num_heads * config.head_size
    kv = config.num_kv_heads * config.head_size
    hidden, ffn = config.hidden_size, config.ffn_size
    layer = hidden * (attention + 2 * kv) + attention * hidden + 3 * hidden * ffn
    products = 2 * (config.num_layers * layer * rows + config.vocab_size * hidden * samples)
    scores = 4 * config.num_layers * attention * context * rows
    return products + scores, decoder.step_bytes + context * samples * config.kv_bytes_per_token(
        decoder.kv_dtype.itemsize
    )


def decode(decoder: Any, batch: int, seconds: float, limit: dict[str, float]) -> dict[str, float]:
    """Time steps of `batch` sequences at a context of 192."""
    blocks = -(-(_CONTEXT + 1) // _BLOCK)
    cache = decoder.make_cache(blocks * batch, _BLOCK)
    step = step_of([(_CONTEXT, 1)] * batch, blocks)
    took = timed(lambda: decoder.forward(step, cache), seconds)
    return rates(decoder, took, batch, batch, _CONTEXT + 1, limit)


def prefill(decoder: Any, tokens: int, seconds: float, limit: dict[str, float]) -> dict[str, float]:
    """Time one prompt in chunks of 256."""
    blocks = -(-tokens // _BLOCK)
    cache = decoder.make_cache(blocks, _BLOCK)
    starts = range(0, tokens, 256)
    steps = [step_of([(start, min(256, tokens - start))], blocks) for start in starts]

    def whole() -> None:
        for step in steps:
            decoder.forward(step, cache)

    found = rates(decoder, timed(whole, seconds), tokens, 1, tokens / 2, limit)
    for name in ("gb_s", "of_read"):
        found.pop(name)
    return found


def step_of(sequences: list[tuple[int, int]], blocks: int) -> Any:
    """Return a step's input: (start, tokens) a sequence, which owns `blocks` blocks in turn."""
    from toolkit.serve.batch import Batch, Slice
    from toolkit.serve.model.inputs import prepare
    from toolkit.serve.request import Phase, Request, SamplingParams

    draw = random.Random(0)
    pieces = []
    for i, (start, tokens) in enumerate(sequences):
        ids = tuple(draw.randrange(1000, 40000) for _ in range(start + tokens))
        owned = list(range(i * blocks, (i + 1) * blocks))
        request = Request(f"r{i}", ids, SamplingParams(), block_ids=owned)
        pieces.append(Slice(request, Phase.PREFILL, start, start + tokens))
    return prepare(Batch(0, tuple(pieces)), _BLOCK)


def timed(action: Any, seconds: float) -> float:
    """Return the median duration of `action`, run for about `seconds` after a first time."""
    action()
    took, end = [], time.perf_counter() + seconds
    while not took or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def rates(
    decoder: Any, took: float, tokens: int, samples: int, context: float, limit: dict[str, float]
) -> dict[str, float]:
    operations, read = work(decoder, tokens, samples, context)
    return {
        "ms": took * 1e3,
        "tokens_s": tokens / took,
        "gb_s": read / took / 1e9,
        "of_read": read / took / 1e9 / limit["read_gb_s"],
        "gflop_s": operations / took / 1e9,
        "of_float32": operations / took / 1e9 / limit["float32_gflop_s"],
    }


def requests(engine: Any, count: int) -> dict[str, float]:
    """Run `count` requests at once through the engine: 128 tokens in, 128 out, greedy."""
    from toolkit.serve.request import Request, SamplingParams

    draw = random.Random(1)
    for i in range(count):
        ids = tuple(draw.randrange(1000, 40000) for _ in range(128))
        engine.add(Request(f"b{i}", ids, SamplingParams(max_tokens=128, ignore_eos=True)))
    start = time.perf_counter()
    computing = 0.0
    while engine.has_work:
        report = engine.step()
        computing += report.end_s - report.start_s
    took = time.perf_counter() - start
    return {"s": took, "output_tokens_s": count * 128 / took, "of_time_in_steps": computing / took}


def show(name: str, values: dict[str, Any]) -> None:
    shown = "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) and abs(value) < 100 else
        f"{key} {value:.0f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )  # fmt: skip
    sys.stdout.write(f"{name:>24}: {shown}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
