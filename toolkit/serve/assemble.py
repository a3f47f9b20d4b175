"""From a model's name to an engine: files found, weights loaded, cache sized, parts joined."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware.affinity import usable_cores
from toolkit.models import weights as model_files
from toolkit.serve import policy
from toolkit.serve.clock import WallClock
from toolkit.serve.engine import Engine
from toolkit.serve.executor.cpu import CpuExecutor, available_memory_bytes
from toolkit.serve.kv.blocks import BlockPool
from toolkit.serve.model import weights
from toolkit.serve.model.loaded import LoadedModel
from toolkit.serve.model.quantisation import check_mode, chosen, kv_dtype, make_decoder
from toolkit.serve.model.tokenizer import Tokenizer
from toolkit.serve.scheduler import Scheduler, SchedulerConfig
from toolkit.units import format_bytes

# Of the memory that is free when nothing is said: the rest of the system needs the others.
_KV_SHARE = 0.25


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is laid out. None leaves it to the machine and the model."""

    max_batch: int = 32
    step_tokens: int = 256
    block_size: int = 16
    kv_bytes: int | None = None
    max_context: int | None = None
    threads: int | None = None
    pin: bool = False
    quantize: str = "none"
    policy: str = "fcfs"
    prefix_cache: bool = True
    max_queue: int | None = None
    max_queue_tokens: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Assembly:
    """An engine and the tokenizer of its model."""

    engine: Engine
    executor: CpuExecutor
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        return self.executor.decoder.config.vocab_size

    def layout(self) -> dict[str, Any]:
        """Return how the engine lies on this machine: threads, memory, limits."""
        scheduler, pool = self.engine.scheduler, self.engine.scheduler.pool
        return {
            "threads": self.executor.threads,
            "pinned_cpus": list(self.executor.cpus),
            "dtype": self.executor.decoder.dtype,
            "kernels": self.executor.decoder.kernels,
            "weight_bytes": self.executor.decoder.weight_bytes,
            "kv_bytes": self.executor.cache.num_bytes,
            "kv_dtype": str(self.executor.decoder.kv_dtype).removeprefix("torch."),
            "kv_tokens": pool.capacity_tokens,
            "kv_blocks": pool.num_blocks,
            "block_size": pool.block_size,
            "max_context": scheduler.config.max_context,
            "max_batch": scheduler.config.max_batch,
            "step_tokens": scheduler.config.step_tokens,
            "policy": scheduler.prefill_policy.name,
        }


def assemble(ref: str | Path, settings: EngineSettings) -> Assembly:
    """Return the engine of a built-in name, a GGUF file, a Hugging Face folder or a hub id."""
    # Loading uses torch's pool too.
    torch.set_num_threads(_threads(settings))
    path = model_files.resolve(str(ref)).path
    tokenizer = Tokenizer.load(path)
    keep_blocks = check_mode(settings.quantize) != "none"
    engine, executor = build(weights.load(path, keep_blocks=keep_blocks), settings)
    return Assembly(engine, executor, tokenizer)


def _threads(settings: EngineSettings) -> int:
    """Return how many threads compute: as asked, as OMP_NUM_THREADS says, else every core."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return settings.threads or min(usable_cores(), int(told) if told.isdigit() else usable_cores())


def build(model: LoadedModel, settings: EngineSettings) -> tuple[Engine, CpuExecutor]:
    """Return an engine and its executor for a loaded model, whose `weights` are emptied.

    Raises InfeasibleError when not even one block fits, UsageError for contradictory settings.
    """
    config = model.config
    mode = chosen(settings.quantize, model.weights.values(), _threads(settings))
    block_bytes = settings.block_size * config.kv_bytes_per_token(kv_dtype(mode).itemsize)
    context = min(settings.max_context or config.max_context, config.max_context)
    if settings.max_context and settings.max_context > config.max_context:
        raise UsageError(
            f"a context of {settings.max_context} tokens was asked for and the model was made for "
            f"{config.max_context}"
        )
    # More than a full batch of longest contexts is never needed.
    most = settings.max_batch * -(-context // settings.block_size)
    kv_bytes = settings.kv_bytes or int(available_memory_bytes() * _KV_SHARE)
    num_blocks = min(most, kv_bytes // block_bytes)
    if num_blocks < 1:
        raise InfeasibleError(
            f"a KV cache of {format_bytes(kv_bytes)} holds no block of {settings.block_size} "
            f"tokens, which takes {format_bytes(block_bytes)}",
            remedy="give it more memory, or smaller blocks",
        )
    capacity = num_blocks * settings.block_size
    if settings.max_context and capacity < context:
        raise InfeasibleError(
            f"a KV cache of {format_bytes(kv_bytes)} holds {capacity} tokens, fewer than the "
            f"context of {context} asked for",
            remedy=f"give it {format_bytes(-(-context // settings.block_size) * block_bytes)}",
        )
    scheduler = Scheduler(
        SchedulerConfig(
            max_batch=settings.max_batch,
            step_tokens=settings.step_tokens,
            max_context=min(context, capacity),
            prefix_cache=settings.prefix_cache,
            max_queue=settings.max_queue,
            max_queue_tokens=settings.max_queue_tokens,
            eos_ids=model.eos_ids,
        ),
        BlockPool(num_blocks, settings.block_size),
        prefill_policy=policy.make(settings.policy),
        # Who loses its blocks first is decided by the decode policy's order.
        decode_policy=policy.make("priority" if settings.policy == "priority" else "fcfs"),
    )
    executor = CpuExecutor(
        make_decoder(model, mode),
        num_blocks=num_blocks,
        block_size=settings.block_size,
        threads=_threads(settings),
        pin=settings.pin,
    )
    return Engine(scheduler, executor, WallClock(), seed=settings.seed), executor
