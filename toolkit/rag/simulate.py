"""TeleRAG's machines, simulated: what lookahead is worth where lists move from host to GPU memory.

Everything here is simulated. The lists that questions want and foresee are real (`ranks`), their
sizes are those of the index scaled to the paper's 60.1 GiB in all; times follow from a few rates:

    generate   decoding reads the model's weights a token, `efficiency` of the memory's bandwidth
    copy       bytes / link, and an overhead a list
    CPU scan   bytes / what one query gets of the host
    GPU scan   bytes in the pool that are probed / memory bandwidth

Without lookahead the CPU scans all probed lists. With it the GPU scans those that were copied while
text was generated and the CPU, at the same time, the rest: arXiv 2502.20969, section 4. What the
paper has and this has not: its data store, encoder, queries and LLM traces, and CPU contention.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from toolkit import units
from toolkit.errors import unknown_name
from toolkit.hardware import find_device
from toolkit.rag.foresight import Mode
from toolkit.rag.ranks import Round

STORE_BYTES = 60.1 * units.GIB  # 21 M vectors of 768 float32 (the paper's data store)


@dataclass(frozen=True)
class Machine:
    """A GPU, its link to the host, the model it generates with, and its pool of lists."""

    name: str
    memory_bandwidth: float
    link: float  # bytes a second, pinned copies
    pool_bytes: float
    num_parameters: float  # of the model, two bytes each
    num_answer_tokens: int = 64
    efficiency: float = 0.7  # of the memory's bandwidth that decoding reaches
    scan: float = 12e9  # bytes a second of host memory that one query scans
    host: float = 200e9  # and all together
    copy_s: float = 20e-6  # a list: two copies, ids and codes

    @property
    def token_s(self) -> float:
        """Seconds a token: the weights are read once."""
        return 2 * self.num_parameters / (self.efficiency * self.memory_bandwidth)


# Pools: what the paper's artifact sets aside on each (its README's settings, GB).
_POOLS = {"rtx-4090": (10e9, (3e9, 8e9)), "h100-sxm": (12e9, (8e9, 22e9)), "h200": (24e9, (8e9,))}


def machines(names: Iterable[str] = _POOLS) -> list[Machine]:
    """Return the paper's machines and models, rates from the catalogue of devices."""
    out = []
    for name in names:
        if name not in _POOLS:
            raise unknown_name("machine", name, _POOLS)
        device = find_device(name)
        pool_bytes, models = _POOLS[name]
        out += [
            Machine(
                f"{name}, {parameters / 1e9:.0f}B", device.memory_bandwidth, device.host_bandwidth,
                pool_bytes, parameters,
            )
            for parameters in models
        ]  # fmt: skip
    return out


@dataclass(frozen=True)
class Simulated:
    """Means over questions, simulated: seconds without and with lookahead, and what it did."""

    machine: str
    mode: Mode
    batch: int
    without_s: float
    with_s: float
    hit_rate: float  # by bytes
    copied_bytes: float  # a question

    @property
    def speedup(self) -> float:
        """How many times as fast."""
        return self.without_s / self.with_s


def simulate(
    machine: Machine,
    questions: Sequence[Sequence[Round]],
    list_nums: np.ndarray,
    *,
    mode: Mode,
    multiple: float = 2.0,
    batch: int = 1,
) -> Simulated:
    """Run questions, `batch` at a time, through a machine.

    `list_nums` [L] are the vectors in each list; a batch shares link and pool evenly, and decodes
    together. Every batch begins with an empty pool.
    """
    sizes = list_nums / list_nums.sum() * STORE_BYTES
    share = replace(
        machine, link=machine.link / batch, pool_bytes=machine.pool_bytes / batch,
        scan=min(machine.scan, machine.host / batch),
    )  # fmt: skip
    without, with_, hits, copied = [], [], [], []
    for rounds in questions:
        answer_s = share.num_answer_tokens * share.token_s
        text_s = sum(each.num_tokens * share.token_s for each in rounds)
        wanted = [sum(sizes[number] for number in each.probes) for each in rounds]
        without.append(answer_s + text_s + sum(wanted) / share.scan)
        took_s, hit_bytes, moved = answer_s, 0.0, 0.0
        pool: dict[int, float] = {}
        for each, all_bytes in zip(rounds, wanted, strict=True):
            window_s = each.num_tokens * share.token_s
            if mode != "off" and each.rankings:
                moved += _copy(share, each, sizes, pool, window_s, multiple * all_bytes, mode)
            near = sum(sizes[number] for number in each.probes if number in pool)
            hit_bytes += near
            search_s = max(near / share.memory_bandwidth, (all_bytes - near) / share.scan)
            took_s += window_s + search_s
        with_.append(took_s)
        hits.append(hit_bytes / sum(wanted))
        copied.append(moved)
    return Simulated(
        machine.name, mode, batch, statistics.fmean(without), statistics.fmean(with_),
        statistics.fmean(hits), statistics.fmean(copied),
    )  # fmt: skip


def _copy(
    machine: Machine,
    this: Round,
    sizes: np.ndarray,
    pool: dict[int, float],
    window_s: float,
    most_bytes: float,
    mode: Mode,
) -> float:
    """Fill the pool during one window, in instalments if progressive; return the bytes copied."""
    rankings = this.rankings if mode == "progressive" else this.rankings[:1]
    moved = 0.0
    for at, ranking in enumerate(rankings, start=1):
        allowed = most_bytes * at / len(rankings) * (1 + 1e-9)  # sums round
        until_s = window_s * at / len(rankings)
        for number in ranking:
            if number in pool:
                continue
            size = float(sizes[number])
            spent_s = (moved + size) / machine.link + (len(pool) + 1) * machine.copy_s
            room = sum(pool.values()) + size <= machine.pool_bytes
            if moved + size > allowed or spent_s > until_s or not room:
                break
            pool[number] = size
            moved += size
    return moved
