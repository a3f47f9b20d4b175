"""The serving systems that are compared, each put together from the engine's own parts.

They differ in policies, in what a step may hold, and in how the device is laid out; cost model, KV
memory and limits are the same for all. Systems that others have built are only like them: what is
modelled is their scheduling, on equally good kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from toolkit.errors import InfeasibleError, unknown_name
from toolkit.hardware.link import Link
from toolkit.serve.batch import Batch
from toolkit.serve.clock import VirtualClock
from toolkit.serve.engine import Engine
from toolkit.serve.executor.simulated import SimulatedExecutor
from toolkit.serve.journal import Journal
from toolkit.serve.kv.blocks import BlockPool
from toolkit.serve.policy import make
from toolkit.serve.request import Phase
from toolkit.serve.scheduler import Scheduler, SchedulerConfig
from toolkit.serve.simulate.engines import PrefillFirstEngine, SplitEngine, UndividedEngine
from toolkit.serve.split import layouts
from toolkit.serve.split.controller import Controller, ControllerConfig, Dynamic, Fixed
from toolkit.serve.split.cost_model import CostModel
from toolkit.units import format_bytes

# Of a device's memory what weights and KV cache may take, as vLLM's default.
MEMORY_PART = 0.9


@dataclass(frozen=True)
class Setup:
    """What is the same for every system: model and device, KV memory, limits, randomness.

    `kv_bytes` None is what the weights leave of the device. `noise` is the standard deviation of
    the logarithm of a step's seconds. `prefill_part` is a static split's share of the units. `link`
    joins the two devices of a disaggregated system.
    """

    cost: CostModel
    max_context: int
    kv_bytes: int | None = None
    max_batch: int = 256
    step_tokens: int = 2048
    block_size: int = 16
    prefill_part: float = 0.5
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    link: Link | None = None
    noise: float = 0.0
    seed: int = 0

    @property
    def num_blocks(self) -> int:
        """KV blocks that fit. Raises InfeasibleError where the weights leave no room."""
        model, device = self.cost.model, self.cost.device
        free = self.kv_bytes or int(device.memory_bytes * MEMORY_PART) - model.weight_bytes
        num_blocks = free // (self.block_size * model.kv_bytes_per_token)
        if num_blocks < 1:
            raise InfeasibleError(
                f"{model.name}'s weights take {format_bytes(model.weight_bytes)}, which leaves no "
                f"KV memory of {device.name}'s {format_bytes(device.memory_bytes)}",
                remedy="use a larger device",
            )
        return num_blocks

    def scheduler(self, prefill: str, decode: str = "fcfs") -> Scheduler:
        """Return the engine's own scheduler with policies by name."""
        limits = SchedulerConfig(
            max_batch=self.max_batch,
            step_tokens=self.step_tokens,
            max_context=self.max_context,
            # Simulated prompts have no content that could be shared.
            prefix_cache=False,
        )
        pool, first = BlockPool(self.num_blocks, self.block_size), make(prefill)
        return Scheduler(limits, pool, first, first if decode == prefill else make(decode))

    def executor(
        self, clock: VirtualClock, handover_s: Callable[[Batch], float] | None = None
    ) -> SimulatedExecutor:
        """Return the cost model as an executor on `clock`."""
        return SimulatedExecutor(
            clock, self.cost, noise=self.noise, seed=self.seed, handover_s=handover_s
        )


Build = Callable[[Setup, VirtualClock], Engine]


@dataclass(frozen=True)
class System:
    """A name, what it is, and how its engine is put together."""

    name: str
    about: str
    build: Build


def _engine(kind: type[UndividedEngine], prefill: str, decode: str = "fcfs") -> Build:
    def build(setup: Setup, clock: VirtualClock) -> Engine:
        scheduler, executor = setup.scheduler(prefill, decode), setup.executor(clock)
        return kind(scheduler, executor, clock, journal=_journal())

    return build


def _split(prefill: str, control: Callable[[Setup], Controller]) -> Build:
    def build(setup: Setup, clock: VirtualClock) -> Engine:
        scheduler, executor = setup.scheduler(prefill), setup.executor(clock)
        return SplitEngine(scheduler, executor, clock, control(setup), journal=_journal())

    return build


def _journal() -> Journal:
    return Journal(source="simulated")


def _static(setup: Setup) -> Controller:
    device = setup.cost.device
    nearest = min(
        layouts.divided(device),
        key=lambda layout: abs(layout.prefill.fraction - setup.prefill_part),
    )
    return Fixed(setup.cost, nearest)


def _always_divided(setup: Setup) -> Controller:
    return Dynamic(setup.cost, replace(setup.controller, may_undivide=False))


def _dynamic(setup: Setup) -> Controller:
    return Dynamic(setup.cost, setup.controller)


def _disaggregated(setup: Setup, clock: VirtualClock) -> Engine:
    """Two devices; finished prompts' KV crosses the link before they decode."""
    cost = setup.cost
    device, link = cost.device, setup.link
    layout = layouts.apart(device, replace(device, name=f"{device.name} (decode)"))
    rate = link.effective_bandwidth if link else device.host_bandwidth
    latency_s = link.latency_s if link else 0.0

    def handover_s(batch: Batch) -> float:
        ready = [piece for piece in batch.of(Phase.PREFILL) if piece.samples]
        tokens = sum(piece.end for piece in ready)
        return len(ready) * latency_s + tokens * cost.model.kv_bytes_per_token / rate

    executor = setup.executor(clock, handover_s)
    controller = Fixed(cost, layout)
    return SplitEngine(setup.scheduler("fcfs"), executor, clock, controller, journal=_journal())


SYSTEMS: Mapping[str, System] = {
    made.name: made
    for made in (
        System(
            "chunked",
            "undivided, chunked prefill, first come first served (like vLLM)",
            _engine(UndividedEngine, "fcfs"),
        ),
        System(
            "chunked-spf",
            "undivided, chunked prefill, shortest prompt first",
            _engine(UndividedEngine, "spf"),
        ),
        System(
            "prefill-first",
            "undivided, prompts before decoding, never both (like SGLang)",
            _engine(PrefillFirstEngine, "fcfs"),
        ),
        System(
            "mlfq",
            "undivided, skip-join multi-level feedback queue with preemption (like FastServe)",
            _engine(UndividedEngine, "mlfq", "mlfq"),
        ),
        System(
            "two-devices",
            "a device each for prefill and decode, KV sent between them (like vLLM's P/D)",
            _disaggregated,
        ),
        System(
            "split-static", "a fixed division, first come first served", _split("fcfs", _static)
        ),
        System(
            "split-static-spf", "a fixed division, shortest prompt first", _split("spf", _static)
        ),
        System(
            "split-fcfs",
            "divided by the cost model, first come first served",
            _split("fcfs", _always_divided),
        ),
        System(
            "split-spf",
            "divided by the cost model, shortest prompt first (Nexus)",
            _split("spf", _always_divided),
        ),
        System(
            "auto",
            "divided or not, by the cost model; shortest prompt first (ours)",
            _split("spf", _dynamic),
        ),
    )
}


def find(name: str) -> System:
    """Return a system by name; an unknown one is an error that names the nearest."""
    if name not in SYSTEMS:
        raise unknown_name("system", name, SYSTEMS)
    return SYSTEMS[name]
