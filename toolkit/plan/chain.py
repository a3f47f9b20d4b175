"""A traced model as a chain of segments: its repeated blocks in order, and what lies around them.

Plans are written by module path; a block is one that the graph's folding found repeated, such as
`blocks.3` or `model.layers.7`. Operators outside any block form segments without a path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.errors import InfeasibleError
from toolkit.ir.graph import Op, OpGraph, Tensor


@dataclass(frozen=True)
class Segment:
    """Operators that follow one another in one block (`path`), or outside the blocks (None).

    Whole blocks of one `structure` (see ir/fold.py) do the same work; "" is unlike any other.
    """

    path: str | None
    ops: tuple[Op, ...]
    structure: str = ""


def blocks(graph: OpGraph) -> tuple[str, ...]:
    """Return the paths of the repeated blocks' instances, in the order they run.

    Raises InfeasibleError for a model without repeated blocks, or one that runs a block twice.
    """
    paths = [segment.path for segment in segments(graph) if segment.path is not None]
    if not paths:
        raise InfeasibleError(
            f"{graph.name} has no repeated blocks (an nn.ModuleList or nn.Sequential) to plan by",
            remedy="give the model a ModuleList of blocks",
        )
    again = sorted({path for path in paths if paths.count(path) > 1})
    if again:
        raise InfeasibleError(
            f"{graph.name} runs {again[0]} more than once, which this plan does not express",
            remedy="use 3f1b, or dap",
        )
    return tuple(paths)


def segments(graph: OpGraph) -> tuple[Segment, ...]:
    """Return the graph's operators as segments, in order; together they are all operators.

    The siblings of a folded block are blocks too, though they may differ from it: the first reads
    the model's input, where the others read an activation.
    """
    structures = {path: block.digest for block in graph.blocks() for path in block.paths}
    lists = {path.rpartition(".")[0] for path in structures}
    runs: list[tuple[str | None, list[Op]]] = []
    for op in graph.ops:
        path = _block_of(op.module_path, lists)
        if not runs or runs[-1][0] != path:
            runs.append((path, []))
        runs[-1][1].append(op)
    times = Counter(path for path, _ in runs)
    return tuple(
        Segment(path, tuple(ops), structures.get(path or "", "") if times[path] == 1 else "")
        for path, ops in runs
    )


def _block_of(path: str, lists: set[str]) -> str | None:
    while path:
        parent, _, name = path.rpartition(".")
        if parent in lists and name.isdigit():
            return path
        path = parent
    return None


def parameters(graph: OpGraph, units: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
    """Return each unit's parameters: those at or under its path, less those of units inside it.

    A tied parameter counts once, under its own name.
    """
    order = sorted(units, key=len, reverse=True)
    found: dict[str, list[Tensor]] = {unit: [] for unit in units}
    for tensor in graph.parameters():
        name = tensor.fqn or tensor.name
        unit = next((path for path in order if not path or name.startswith(f"{path}.")), None)
        if unit is not None:
            found[unit].append(tensor)
    return {unit: tuple(tensors) for unit, tensors in found.items()}


def crossing(graph: OpGraph, begins_at: str) -> tuple[Tensor, ...]:
    """Return what a stage that begins at the module path `begins_at` receives.

    That is what depends on a parameter, is made before, and is used at or after it; values that
    depend on none are computed again (see lower/stages.py, which cuts the same way).
    """
    start = first_op(graph, begins_at)
    made = {name for op in graph.ops[:start] for name in op.outputs} & graph.learned
    used = {name for op in graph.ops[start:] for name in op.inputs} | set(graph.outputs)
    return tuple(graph.tensors[name] for name in graph.tensors if name in made and name in used)


def first_op(graph: OpGraph, path: str) -> int:
    """Return the position of the first operator in the module at `path`."""
    for i, op in enumerate(graph.ops):
        if op.module_path == path or op.module_path.startswith(f"{path}."):
            return i
    raise InfeasibleError(f"no operator of {graph.name} runs in {path!r}")


def stage_segments(
    graph: OpGraph, begins_at: Sequence[str | None]
) -> tuple[tuple[Segment, ...], ...]:
    """Return the segments of each stage; stages begin at these module paths (None: the start).

    Raises InfeasibleError when nothing runs there, or the paths are not in the model's order.
    """
    starts = [first_op(graph, path) if path is not None else 0 for path in begins_at]
    if starts != sorted(set(starts)) or starts[:1] != [0]:
        raise InfeasibleError(f"stages must follow the order of {graph.name}, not {begins_at}")
    ends = [*starts[1:], len(graph.ops)]
    found: list[list[Segment]] = [[] for _ in starts]
    place = stage = 0
    for segment in segments(graph):
        ops = segment.ops
        while ops:
            if place == ends[stage]:
                stage += 1
            here = ops[: ends[stage] - place]
            whole = len(here) == len(segment.ops)
            found[stage].append(segment if whole else Segment(segment.path, here))
            place += len(here)
            ops = ops[len(here) :]
    return tuple(tuple(stage) for stage in found)


def partition(seconds: Sequence[float], num_parts: int) -> tuple[int, ...]:
    """Return where each of `num_parts` runs of consecutive items begins so that the longest run
    is as short as can be (exact, by dynamic programming).

    >>> partition([4, 1, 1, 1, 1], 2)
    (0, 1)
    """
    n = len(seconds)
    before = [0.0]
    for value in seconds:
        before.append(before[-1] + value)
    # best[k][j]: the shortest longest run when items [0, j) make k + 1 parts.
    best = [before[:]]
    cut: list[list[int]] = [[0] * (n + 1)]
    for part in range(1, num_parts):
        row, cuts = [float("inf")] * (n + 1), [0] * (n + 1)
        for j in range(part + 1, n + 1):
            for i in range(part, j):
                longest = max(best[part - 1][i], before[j] - before[i])
                if longest < row[j]:
                    row[j], cuts[j] = longest, i
        best.append(row)
        cut.append(cuts)
    starts, end = [], n
    for part in range(num_parts - 1, 0, -1):
        end = cut[part][end]
        starts.append(end)
    return (0, *reversed(starts))
