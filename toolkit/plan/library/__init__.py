"""The plan library: one readable file a plan."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from toolkit.errors import unknown_name
from toolkit.plan.library import (
    co_shard,
    context_parallel,
    dap,
    data_parallel,
    dualpipe_v,
    fsdp,
    fsdp_tp,
    gpipe,
    grid,
    hsdp,
    interlaced,
    interleaved,
    megatron,
    one_f_one_b,
    sequence_parallel,
    three_f_one_b,
    zb_v,
    zero,
    zero_bubble,
)
from toolkit.plan.plan import Plan

# strategy name -> the function that writes its plan
STRATEGIES: Mapping[str, Callable[..., Plan]] = {
    "dp": data_parallel.plan,
    "zero-1": zero.plan_1,
    "zero-2": zero.plan_2,
    "fsdp": fsdp.plan,
    "hsdp": hsdp.plan,
    "tp": megatron.plan,
    "tp-sp": sequence_parallel.plan,
    "fsdp-tp": fsdp_tp.plan,
    "gpipe": gpipe.plan,
    "1f1b": one_f_one_b.plan,
    "interleaved": interleaved.plan,
    "zb-h1": zero_bubble.plan,
    "zb-v": zb_v.plan,
    "dualpipe-v": dualpipe_v.plan,
    "grid": grid.plan,
    "context": context_parallel.plan,
    "dap": dap.plan,
    "co-shard": co_shard.plan,
    "interlaced": interlaced.plan,
    "3f1b": three_f_one_b.plan,
}


def find(strategy: str) -> Callable[..., Plan]:
    """Return the function that writes plans of `strategy`; UsageError for an unknown one."""
    if strategy not in STRATEGIES:
        raise unknown_name("strategy", strategy, STRATEGIES)
    return STRATEGIES[strategy]


def describe(strategy: str) -> str:
    """Return what a strategy does: the first paragraph of its file."""
    text = sys.modules[find(strategy).__module__].__doc__ or ""
    return " ".join(text.partition("\n\n")[0].split())
