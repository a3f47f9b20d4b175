"""Models that run their blocks several times, without gradients in passes before the last, as
AlphaFold 2 recycles (Jumper et al. 2021, supplement 1.10).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from toolkit.errors import InfeasibleError
from toolkit.ir.graph import OpGraph
from toolkit.plan import chain


def blocks_by_pass(graph: OpGraph) -> tuple[tuple[str, ...], ...]:
    """Return the blocks each pass through the model runs, in order."""
    paths = [segment.path for segment in chain.segments(graph) if segment.path is not None]
    if not paths:
        raise InfeasibleError(f"{graph.name} has no repeated blocks to plan by")
    found: list[list[str]] = []
    for path in paths:
        if path == paths[0]:
            found.append([])
        found[-1].append(path)
    if any(some != found[0] for some in found):
        raise InfeasibleError(f"the passes of {graph.name} run different blocks")
    return tuple(map(tuple, found))


def entries(graph: OpGraph, blocks: Sequence[str]) -> list[str | None]:
    """Return where each pass begins: None for the first, then the module run after the last block.

    What the model itself does in between belongs to the pass before.
    """
    found: list[str | None] = [None]
    segments = chain.segments(graph)
    for before, segment in itertools.pairwise(segments):
        if before.path == blocks[-1]:
            inside = next((op for op in segment.ops if op.module_path), None)
            found.append(inside.module_path.partition(".")[0] if inside else None)
    # What follows the last block of the last pass is no pass.
    return found[: sum(segment.path == blocks[0] for segment in segments)]


def learns(graph: OpGraph, num_passes: int) -> list[bool]:
    """Return whether each pass has gradients."""
    found: list[bool] = []
    first = None
    for segment in chain.segments(graph):
        first = first or segment.path
        if segment.path is not None and segment.path == first:
            found.append(any(op.name in graph.differentiated for op in segment.ops))
    return found[:num_passes]


def repeats(segments: Sequence[chain.Segment]) -> tuple[int, ...]:
    """Return for every segment the one of the last pass that it goes before: itself in the last.

    What stands between two passes belongs to the later one. Where the passes do not run the same
    blocks in the same order, every segment is its own.
    """
    paths = [segment.path for segment in segments]
    blocks = [path for path in paths if path is not None]
    length = len(dict.fromkeys(blocks))
    once = tuple(range(len(segments)))
    if not blocks or blocks != blocks[:length] * (len(blocks) // length):
        return once
    ends = [at for at, path in enumerate(paths) if path == blocks[-1]]
    first = ends[-2] + 1 if len(ends) > 1 else 0
    place = {path: at for at, path in enumerate(paths) if at >= first and path is not None}
    found = []
    at = first
    for index, path in enumerate(paths):
        if index >= first:
            at = index
        elif path is not None:
            at = place[path]
        elif paths[index + 1] == blocks[0]:
            at = first
        found.append(at)
    return tuple(found)
