"""From a model's name to an engine: files found, weights loaded, cache sized, parts joined."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from toolkit.errors import InfeasibleError, UsageError, unknown_name
from toolkit.hardware.affinity import usable_cores
from toolkit.models import weights as model_files
from toolkit.serve import divide, policy, tensor_plan
from toolkit.serve.clock import WallClock
from toolkit.serve.engine import Engine
from toolkit.serve.executor import cuda
from toolkit.serve.executor.cpu import CpuExecutor, available_memory_bytes
from toolkit.serve.executor.device import DeviceExecutor, Place, Room
from toolkit.serve.executor.phases import PhasedCpuExecutor
from toolkit.serve.executor.tensor_parallel import Orders, TensorParallelExecutor
from toolkit.serve.kv.blocks import BlockPool
from toolkit.serve.model import weights
from toolkit.serve.model.config import DecoderConfig
from toolkit.serve.model.device import DeviceDecoder
from toolkit.serve.model.loaded import LoadedModel
from toolkit.serve.model.part import Part
from toolkit.serve.model.quantisation import check_mode, chosen, kv_dtype, make_decoder
from toolkit.serve.model.tokenizer import Tokenizer
from toolkit.serve.scheduler import Scheduler, SchedulerConfig
from toolkit.serve.split.controller import Dynamic
from toolkit.serve.split.engine import DividedEngine
from toolkit.serve.split.settings import SplitSettings
from toolkit.serve.tensor_plan import TensorPlan
from toolkit.units import format_bytes

# Of the memory that is free when nothing is said: the rest of the system needs the others.
_KV_SHARE = 0.25
AnyExecutor = CpuExecutor | DeviceExecutor | PhasedCpuExecutor
DEVICES = ("cpu", "cuda")
# What weights and arithmetic may be in on a device that is not the CPU; "auto" is its own half.
DTYPES = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is laid out. None leaves it to the machine and the model.

    Raises UsageError for what no model could run with, before one is loaded.
    `device` is one of DEVICES; `dtype`, one of DTYPES, is for "cuda", `quantize` for "cpu". `plan`
    is a plan.json whose tensor-parallel degree says how many ranks share the model; then `kv_bytes`
    is what each of them takes. `split` says how the cores are divided between the phases, if so.
    """

    max_batch: int = 32
    step_tokens: int = 256
    block_size: int = 16
    kv_bytes: int | None = None
    max_context: int | None = None
    threads: int | None = None
    pin: bool = False
    quantize: str = "none"
    device: str = "cpu"
    dtype: str = "auto"
    plan: Path | None = None
    policy: str = "fcfs"
    prefix_cache: bool = True
    max_queue: int | None = None
    max_queue_tokens: int | None = None
    seed: int = 0
    split: SplitSettings = field(default_factory=SplitSettings)

    def __post_init__(self) -> None:
        check_mode(self.quantize)
        policy.make(self.policy)
        for what, value in (
            ("tokens in a KV block", self.block_size),
            ("tokens of context", self.max_context),
            ("bytes of KV cache", self.kv_bytes),
            ("threads", self.threads),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{value} {what} are none", remedy="use 1 or more")
        self.limits()

    def limits(self, **known: Any) -> SchedulerConfig:
        """Return the scheduler's limits; `known` are those that depend on the model."""
        return SchedulerConfig(
            max_batch=self.max_batch,
            step_tokens=self.step_tokens,
            prefix_cache=self.prefix_cache,
            max_queue=self.max_queue,
            max_queue_tokens=self.max_queue_tokens,
            **known,
        )


@dataclass(frozen=True)
class Assembly:
    """An engine and the tokenizer of its model."""

    engine: Engine
    executor: AnyExecutor
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        return self.executor.decoder.config.vocab_size

    def layout(self) -> dict[str, Any]:
        """Return how the engine lies on this machine: threads, memory, limits."""
        scheduler, pool = self.engine.scheduler, self.engine.scheduler.pool
        split, divided = "off", None
        if isinstance(self.engine, DividedEngine):
            split = "auto" if isinstance(self.engine.controller, Dynamic) else "fixed"
            divided = [str(layout) for layout in self.engine.controller.layouts]
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
            "split": split,
            "layouts": divided,
        }


def assemble(ref: str | Path, settings: EngineSettings) -> Assembly:
    """Return the engine of a built-in name, a GGUF file, a Hugging Face folder or a hub id."""
    # Before anything is fetched for what cannot run.
    _plan_and_place(settings)
    # Loading uses torch's pool too.
    torch.set_num_threads(_threads(settings))
    path = model_files.resolve(str(ref)).path
    tokenizer = Tokenizer.load(path)
    return Assembly(*load(path, settings), tokenizer)


def load(path: Path, settings: EngineSettings) -> tuple[Engine, AnyExecutor]:
    """Return an engine of the model in a file or folder, and its executor; see `build`.

    With a plan the other ranks are started. Raises what tensor_plan.read and Part.config do too.
    """
    plan, place = _plan_and_place(settings)
    if plan is None:
        keep_blocks = settings.quantize != "none"
        return build(weights.load(path, keep_blocks=keep_blocks), settings, place)
    part = Part(0, plan.degree)
    model = weights.load(path, part=part)
    plan.check(model.config.num_layers)
    return build(model, settings, place, Share(path, part))


def _plan_and_place(settings: EngineSettings) -> tuple[TensorPlan | None, Place | None]:
    plan = None if settings.plan is None else tensor_plan.read(settings.plan)
    return plan, place_of(settings, 1 if plan is None else plan.degree)


def _threads(settings: EngineSettings) -> int:
    """Return how many threads compute: as asked, as OMP_NUM_THREADS says, else every core."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return settings.threads or min(usable_cores(), int(told) if told.isdigit() else usable_cores())


@dataclass(frozen=True)
class Share:
    """The first rank's part of the model in `source`, where the others find theirs."""

    source: Path
    part: Part


def place_of(settings: EngineSettings, num_ranks: int = 1) -> Place | None:
    """Return the device of the first of `num_ranks`, or None for the CPU and its own kernels.

    Raises UsageError for one that is not there or is not served in what is asked for.
    """
    if settings.device not in DEVICES:
        raise unknown_name("device", settings.device, DEVICES)
    if settings.dtype not in DTYPES:
        raise unknown_name("dtype", settings.dtype, DTYPES)
    if settings.device == "cpu" and settings.dtype not in ("auto", "float32"):
        raise UsageError(
            f"the CPU computes in float32, not {settings.dtype}",
            remedy="use --quantize int8 or int4 for smaller weights",
        )
    if settings.quantize != "none" and (settings.device == "cuda" or num_ranks > 1):
        raise UsageError(
            f"--quantize {settings.quantize} is for the CPU's own kernels, which one process runs",
            remedy="leave it out, or serve on the CPU without a plan",
        )
    if settings.device == "cuda" or num_ranks > 1:
        _check_undivided(settings)
    if settings.device == "cuda":
        return cuda.place(DTYPES[settings.dtype], num_devices=num_ranks)
    if num_ranks == 1:
        return None
    # The kernels compute a whole step in one call: ranks that meet within one compute in torch.
    return Place(
        torch.device("cpu"),
        torch.float32,
        lambda: int(available_memory_bytes() * _KV_SHARE) // num_ranks,
    )


def _check_undivided(settings: EngineSettings) -> None:
    if settings.split.split != "off":
        raise UsageError(
            "a device is divided between the phases on one process's CPU cores only",
            remedy="use --split off, or serve on the CPU without a plan",
        )


def build(
    model: LoadedModel,
    settings: EngineSettings,
    place: Place | None = None,
    share: Share | None = None,
) -> tuple[Engine, AnyExecutor]:
    """Return an engine and its executor for a loaded model, whose `weights` are emptied.

    `place` is a device as from `place_of`, None the CPU and its own kernels. `share` says that the
    model is a part, and where the other ranks find theirs. Raises InfeasibleError when not even one
    block fits, UsageError for contradictory settings.
    """
    config = model.config
    context = min(settings.max_context or config.max_context, config.max_context)
    if settings.max_context and settings.max_context > config.max_context:
        raise UsageError(
            f"a context of {settings.max_context} tokens was asked for and the model was made for "
            f"{config.max_context}",
            remedy=f"use at most {config.max_context}",
        )
    executor: AnyExecutor
    if place is None:
        mode = chosen(settings.quantize, model.weights.values(), _threads(settings))
        kv_bytes = settings.kv_bytes or int(available_memory_bytes() * _KV_SHARE)
        value_bytes = kv_dtype(mode).itemsize
        num_blocks = _num_blocks(config, settings, context, kv_bytes, value_bytes)
        scheduler = _scheduler(model, settings, context, num_blocks)
        made = make_decoder(model, mode)
        if settings.split.split != "off":
            threads, seed = _threads(settings), settings.seed
            return divide.build(
                made, scheduler, settings.split, threads=threads, pin=settings.pin, seed=seed
            )
        executor = CpuExecutor(
            made,
            num_blocks=num_blocks,
            block_size=settings.block_size,
            threads=_threads(settings),
            pin=settings.pin,
        )
    else:
        _check_undivided(settings)
        decoder = DeviceDecoder(config, model.weights, device=place.device, dtype=place.dtype)
        kv_bytes = settings.kv_bytes or place.kv_bytes()
        num_blocks = _num_blocks(config, settings, context, kv_bytes, place.dtype.itemsize)
        scheduler = _scheduler(model, settings, context, num_blocks)
        longest = scheduler.config.max_context
        room = Room(num_blocks, settings.block_size, settings.max_batch, longest)
        executor = _on_device(decoder, room, place, share, _threads(settings))
    return Engine(scheduler, executor, WallClock(), seed=settings.seed), executor


def _scheduler(
    model: LoadedModel, settings: EngineSettings, context: int, num_blocks: int
) -> Scheduler:
    return Scheduler(
        settings.limits(
            max_context=min(context, num_blocks * settings.block_size), eos_ids=model.eos_ids
        ),
        BlockPool(num_blocks, settings.block_size),
        prefill_policy=policy.make(settings.policy),
        # Who loses its blocks first is decided by the decode policy's order.
        decode_policy=policy.make("priority" if settings.policy == "priority" else "fcfs"),
    )


def _on_device(
    decoder: DeviceDecoder, room: Room, place: Place, share: Share | None, threads: int
) -> DeviceExecutor:
    if share is None:
        return DeviceExecutor(decoder, room, recorder=place.recorder, threads=threads)
    # Ranks on GPUs compute there; those on the CPU share its cores.
    if place.device.type == "cpu":
        threads = max(1, threads // share.part.degree)
    kind = place.device.type
    orders = Orders(share.source, share.part, kind, place.dtype, room, threads)
    return TensorParallelExecutor(decoder, orders, recorder=place.recorder)


def _num_blocks(
    config: DecoderConfig, settings: EngineSettings, context: int, kv_bytes: int, value_bytes: int
) -> int:
    """Return how many KV blocks to make. Raises InfeasibleError where too few fit."""
    block_bytes = settings.block_size * config.kv_bytes_per_token(value_bytes)
    # More than a full batch of longest contexts is never needed.
    most = settings.max_batch * -(-context // settings.block_size)
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
    return num_blocks
