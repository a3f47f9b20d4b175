"""A divided engine on this machine's cores: cost model, controller, executor and loop, joined."""

from __future__ import annotations

from dataclasses import replace

from toolkit.errors import UsageError
from toolkit.hardware import find_device
from toolkit.hardware.device import Device
from toolkit.hardware.measured import processor_name
from toolkit.hardware.share import split as cut
from toolkit.serve.clock import WallClock
from toolkit.serve.executor.phases import PhasedCpuExecutor
from toolkit.serve.model.native import NativeDecoder
from toolkit.serve.scheduler import Scheduler
from toolkit.serve.split import layouts
from toolkit.serve.split.calibration import ServeCalibration
from toolkit.serve.split.controller import Controller, ControllerConfig, Dynamic, Fixed
from toolkit.serve.split.cost_model import CostModel
from toolkit.serve.split.decoder import MatrixSize, decoder_work
from toolkit.serve.split.engine import DividedEngine
from toolkit.serve.split.settings import SplitSettings
from toolkit.serve.split.work import ModelWork

# A team of threads is made for every size a phase may be given, so sizes are few on many cores.
_MOST_SIZES = 16


def build(
    decoder: object,
    scheduler: Scheduler,
    settings: SplitSettings,
    *,
    threads: int,
    pin: bool,
    seed: int = 0,
) -> tuple[DividedEngine, PhasedCpuExecutor]:
    """Return a divided engine of `decoder` on `threads` cores, and its executor.

    Raises UsageError without the compiled kernels, InfeasibleError where a fixed division was asked
    for and there is one core.
    """
    if not isinstance(decoder, NativeDecoder):
        raise UsageError(
            "phases compute at once on the compiled kernels only, and they are not there",
            remedy="install a C++ compiler, or use --split off",
        )
    cost = cost_model(decoder, settings, threads)
    controller = _controller(cost, settings)
    executor = PhasedCpuExecutor(
        decoder,
        controller.layouts,
        num_blocks=scheduler.pool.num_blocks,
        block_size=scheduler.pool.block_size,
        threads=threads,
        pin=pin,
    )
    return DividedEngine(scheduler, executor, WallClock(), controller, seed=seed), executor


def work_of(decoder: NativeDecoder, name: str = "decoder") -> ModelWork:
    """Return the kernels of a step of a decoder as it is held here."""
    head, *others = (
        MatrixSize(matrix.padded_rows, matrix.columns, matrix.num_bytes)
        for matrix in decoder.matrices
    )
    return decoder_work(
        name,
        decoder.config,
        others,
        head,
        kv_item_bytes=decoder.kv_dtype.itemsize,
        weight_bytes=decoder.weight_bytes,
    )


def device_of(threads: int) -> Device:
    """Return this machine's cores as a device of `threads` units, uncalibrated."""
    found = find_device("cpu")
    found = found.sliced(min(threads, found.num_units))
    step = -(-threads // _MOST_SIZES)
    return replace(found, num_units=threads, unit_granularity=(step, step))


def cost_model(decoder: NativeDecoder, settings: SplitSettings, threads: int) -> CostModel:
    """Return the cost model of a decoder on so many cores: calibrated, or as the roofline has it.

    Raises UsageError for a calibration of something else.
    """
    work = work_of(decoder)
    path = settings.calibration
    if path is not None:
        found = ServeCalibration.load(path)
        found.check(work, threads, processor_name())
        return found.cost_model()
    return CostModel(work, device_of(threads))


def _controller(cost: CostModel, settings: SplitSettings) -> Controller:
    if settings.split == "fixed":
        prefill, _ = cut(cost.device, settings.prefill_part)
        return Fixed(cost, layouts.at(cost.device, prefill.units))
    assert settings.split == "auto", settings.split
    return Dynamic(cost, ControllerConfig(tbt_target_s=settings.tbt_target_s))
