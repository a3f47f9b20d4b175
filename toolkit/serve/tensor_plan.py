"""What serving reads of a plan.json: a tensor-parallel degree, if all else in it can be served.

A plan is about training a step; serving takes from it how Linears are split over devices, and
nothing of its order. It is read as the file it is, because pillars do not import one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import record
from toolkit.errors import FormatError, InfeasibleError

_KIND, _VERSION = "plan", 2
# What a Linear of a block is called in the zoo and by transformers, and how it must be split.
_HOW = {
    **dict.fromkeys(("query", "key", "value", "gate", "up"), "column"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "column"),
    **dict.fromkeys(("output", "down", "o_proj", "down_proj"), "row"),
}
_PER_BLOCK = 7
# The dims of a Linear in a plan's splits: its outputs and its inputs.
_DIMS = {"n": "column", "k": "row"}
_WORDS = {
    "pipeline": "stages of a pipeline",
    "data": "copies of the model",
    "replica": "copies of the model",
    "context": "parts of every context",
}


@dataclass(frozen=True)
class TensorPlan:
    """A plan whose every block is split over `degree` ranks. `model` is what it was made for."""

    model: str
    degree: int
    num_blocks: int

    def check(self, num_layers: int) -> None:
        """Raise InfeasibleError unless it was made for a model of so many layers."""
        if self.num_blocks != num_layers:
            raise InfeasibleError(
                f"the plan is for {self.model} with {self.num_blocks} blocks, and the model served "
                f"has {num_layers}",
                remedy="make a plan for this model",
            )


def read(path: Path) -> TensorPlan:
    """Return what serving takes of the plan at `path`.

    Raises UsageError where there is no file, FormatError where it is not a plan of this version,
    InfeasibleError where the plan divides anything in a way that is not served.
    """
    body = record.read(path, kind=_KIND, version=_VERSION)["body"]
    try:
        return _read(body)
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path} lacks or mistakes {error}", remedy="write it again with `toolkit plan make`"
        ) from error


def _read(body: Mapping[str, Any]) -> TensorPlan:
    sizes = {axis["name"]: int(axis["size"]) for axis in body["mesh"]}
    for name, words in _WORDS.items():
        if sizes.get(name, 1) > 1:
            raise _refused(f"it divides {sizes[name]} ranks into {words} (axis {name})")
    if len(body["stages"]) != 1:
        raise _refused(f"it has {len(body['stages'])} stages")
    degree = sizes.get("tensor", 1)
    if degree < 2:
        raise _refused(
            f"its strategy is {body['strategy']}, which splits nothing over a tensor axis"
        )
    if any(split["axis"] is None for split in body["splits"]):
        raise _refused("it has co-shards, parts of an operator one after another")
    blocks = body["stages"][0]["blocks"]
    ways = dict.fromkeys(blocks, 0)
    for pattern, name, how in (*_placed(body["placements"]), *_split(body["splits"])):
        if _HOW.get(name) != how:
            raise _refused(f"{pattern}.{name} is split by {how}s")
        for block in blocks:
            ways[block] += re.fullmatch(pattern, block) is not None
    odd = next((block for block, count in ways.items() if count != _PER_BLOCK), None)
    if odd is not None:
        raise _refused(f"it splits {ways[odd]} Linears of {odd}, not all {_PER_BLOCK}")
    return TensorPlan(body["provenance"]["model"], degree, len(blocks))


def _placed(placements: list[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Yield (pattern of the block, name of the Linear, how it is split) of placed Linears.

    Tokens split between Linears ("sequence") leave the weights where they are.
    """
    for placement in placements:
        if placement["axis"] == "tensor" and placement["how"] != "sequence":
            yield *_parted(placement["module"]), placement["how"]


def _split(splits: list[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """The same of Linears split as operators (`blocks.*.ffn.up:linear`, dim n or k)."""
    for split in splits:
        path, _, kind = split["ops"].partition(":")
        if split["axis"] == "tensor" and kind == "linear":
            yield *_parted(path), _DIMS.get(split["dim"], split["dim"])


def _parted(path: str) -> tuple[str, str]:
    """Return a pattern of the block, and the Linear's own name: it is in a module of the block."""
    block, name = path.rsplit(".", 2)[0], path.rpartition(".")[2]
    return re.escape(block).replace(r"\*", r"\d+"), name


def _refused(why: str) -> InfeasibleError:
    return InfeasibleError(
        f"this plan cannot be served: {why}",
        remedy="make one with `toolkit plan make --strategy tp`; for copies, start a server each",
    )
