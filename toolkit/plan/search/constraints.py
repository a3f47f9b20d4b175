"""What a user rules out or asks for, from a TOML or JSON file; an unknown key is an error."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import config
from toolkit.errors import FormatError, UsageError, unknown_name
from toolkit.ir.graph import OpGraph
from toolkit.plan.plan import DATA_WAYS, OFFLOADS
from toolkit.plan.program import select
from toolkit.plan.search.schedules import SEARCHED

# Plans of the library that are written beside what the search composes (extras.py).
PLANS = ("co-shard", "interlaced", "3f1b", "dap")
# How operators are split over context and tensor: Linears by columns and rows; the same with
# attention however it is written, and that with the vocabulary (only when named, both); each as
# the search finds.
SPLITS = ("columns", "heads", "regions", "searched")
RECOMPUTE = ("none", "needed", "all")
Sizes = int | list[int] | None


@dataclass(frozen=True)
class Constraints:
    """Sizes of axes (a number or the numbers allowed), and what may be chosen.

    `data` counts all ranks that see other samples, `replica` the groups of them that shard
    parameters among themselves (hybrid sharding): 1 for none.

    `replicated` lists modules or operators (patterns, as in plans) that stay whole on every rank
    of the context and tensor axes. `parameters` are the ways of the data axis ("shard" is ZeRO-3).
    `offload` are the ways to use the host; where "none" is one, the others are tried where nothing
    fits without.
    """

    pipeline: Sizes = None
    replica: Sizes = None
    data: Sizes = None
    context: Sizes = None
    tensor: Sizes = None
    max_pipeline: int | None = None
    max_tensor: int | None = None
    max_context: int | None = None
    microbatches: Sizes = None
    microbatch_size: Sizes = None
    schedules: list[str] | None = None
    parameters: list[str] | None = None
    recompute: list[str] | None = None
    offload: list[str] | None = None
    replicated: list[str] | None = None
    splits: list[str] | None = None
    plans: list[str] | None = None  # [] for none
    equal_stages: bool = False  # as many blocks in every stage
    native: bool = False  # no splits of single operators, only what placements of modules say
    runnable: bool = True  # only what a rung of this version runs

    def __post_init__(self) -> None:
        for what, given, known in (
            ("schedule", self.schedules, SEARCHED),
            ("way of parameters", self.parameters, DATA_WAYS),
            ("recompute", self.recompute, RECOMPUTE),
            ("offload", self.offload, OFFLOADS),
            ("way to split", self.splits, SPLITS),
            ("plan", self.plans, PLANS),
        ):
            for name in given or []:
                if name not in known:
                    raise unknown_name(what, name, known)
            if given == [] and what != "plan":
                raise UsageError(f"the constraints allow no {what} at all")
        for name in (
            "pipeline", "replica", "data", "context", "tensor", "microbatches", "microbatch_size",
        ):  # fmt: skip
            sizes = getattr(self, name)
            for size in [sizes] if isinstance(sizes, int) else sizes or []:
                if size < 1:
                    raise UsageError(f"constraint {name} = {size}; sizes are at least 1")

    def allows(self, name: str, size: int) -> bool:
        """Return whether an axis (or a count) may have this size."""
        wanted: Sizes = getattr(self, name)
        most = getattr(self, f"max_{name}", None)
        if most is not None and size > most:
            return False
        if wanted is None:
            return True
        return size == wanted if isinstance(wanted, int) else size in wanted

    def whole_ops(self, graph: OpGraph) -> frozenset[str]:
        """Return the operators that stay whole. Raises UsageError for a pattern of nothing."""
        if not self.replicated:
            return frozenset()
        return frozenset(op.name for op in select.ops(graph, self.replicated))


def load(path: Path) -> Constraints:
    """Read constraints. Raises UsageError naming a wrong key, FormatError for a broken file."""
    if path.suffix == ".json":
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise UsageError(f"no such file: {path}") from error
        except ValueError as error:
            raise FormatError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise FormatError(f"{path} is not a JSON object")
    else:
        values = config.read_toml(path)
    return config.parse(Constraints, values, where=str(path))
