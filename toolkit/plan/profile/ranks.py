"""What each rank runs to profile models, all at the same time.

python -m toolkit.plan.profile.ranks found.jsonl jobs.json
"""

from __future__ import annotations

import inspect
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from toolkit import models
from toolkit.errors import ToolkitError
from toolkit.ir import interpret
from toolkit.plan import runtime, subject
from toolkit.plan.profile import operators, wrappers
from toolkit.plan.profile.fit import Observation


def run_model(model: str, sizes: Mapping[str, int]) -> list[Observation]:
    """Profile one model at one size."""
    wanted: dict[str, Any] = dict(sizes)
    graph = subject.load(model, **wanted).graph
    found = models.load(model)
    module = found.build("cpu")
    args, kwargs = found.example(**wanted, device="cpu")
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    given = [value for value in named.values() if isinstance(value, torch.Tensor)]
    tensors = {
        **interpret.weights(graph, module),
        **dict(zip(graph.inputs, given, strict=True)),
    }
    return [
        *operators.observe(graph, tensors, dist.barrier),
        operators.observe_update(module, dist.barrier),
    ]


def over_ranks(own: Sequence[Observation], num_ranks: int) -> list[Observation]:
    """Return the mean of all ranks' seconds, on every rank."""
    gathered: list[Any] = [None] * num_ranks
    dist.all_gather_object(gathered, [one.seconds for one in own])
    return [
        replace(one, seconds=statistics.mean(seconds))
        for one, seconds in zip(own, zip(*gathered, strict=True), strict=True)
    ]


def main(arguments: Sequence[str]) -> None:
    out, work = Path(arguments[0]), Path(arguments[1])
    with runtime.session() as here:

        def write(own: list[Observation]) -> None:
            found = over_ranks(own, here.num_ranks)
            if here.rank == 0:
                with out.open("a") as file:
                    file.write(json.dumps([one.to_json() for one in found]) + "\n")

        for job in json.loads(work.read_text()):
            write(run_model(job["model"], job["sizes"]))
        write(wrappers.observe(here.num_ranks))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ToolkitError as error:
        sys.exit(str(error))  # the parent shows it as what this rank printed
    runtime.leave()
