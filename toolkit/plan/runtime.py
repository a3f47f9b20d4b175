"""Running a plan: a process group, the lowered model of this rank, steps, and measured spans.

Ranks come from the environment torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, ...). gloo on CPU;
NCCL on CUDA follows the same path and has never been run on hardware.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from toolkit import models
from toolkit.errors import ToolkitError, UsageError
from toolkit.hardware.affinity import usable_cores
from toolkit.plan import text
from toolkit.plan.lower import compat, ladder
from toolkit.plan.lower.lowered import Batch, Lowered
from toolkit.plan.lower.recorder import Recorder
from toolkit.plan.plan import Plan
from toolkit.timeline import Timeline


@dataclass(frozen=True)
class Session:
    """This rank's place among the others."""

    rank: int
    num_ranks: int
    device: torch.device


@contextlib.contextmanager
def session() -> Iterator[Session]:
    """Join the ranks torchrun started; at the end of the block, wait until all are there.

    What is left to do then is to write and `leave`. The groups stay until the process ends: where
    one of gloo is destroyed, a thread of its own that drops its last tensor waits for Python's
    lock, and the destructor, which holds that, for the thread.

    Raises UsageError when the process was not started by torchrun or `launch`.
    """
    if "RANK" not in os.environ:
        raise UsageError(
            "this process is no rank: RANK is not set",
            remedy="start it with: torchrun --nproc-per-node N ...",
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= num_local
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, usable_cores() // num_local))
    compat.self_test()
    _join("nccl" if cuda else "gloo", num_local)
    try:
        yield Session(dist.get_rank(), dist.get_world_size(), device)
        # Nobody leaves while another rank may still be sending.
        dist.barrier()
    except BaseException:
        dist.destroy_process_group()  # the others need not wait
        raise


def answer_all(work: Path, out: Path, answer: Callable[[Any, Session], Any]) -> None:
    """Answer every job of the JSON list `work` on this rank; rank 0 adds a line to `out` for each
    as it is done. What ranks refuse in words is an answer, too: {"refused": why}.
    """
    with session() as here:
        for job in json.loads(work.read_text()):
            try:
                entry = answer(job, here)
            except ToolkitError as error:  # all ranks refuse alike, before they communicate
                entry = {"refused": str(error)}
            if here.rank == 0:
                with out.open("a") as file:
                    file.write(json.dumps(entry) + "\n")


def leave() -> NoReturn:
    """End this process, a rank whose work is done and written, with exit code 0.

    Python is not torn down: a thread of torch that asks for its lock meanwhile would abort the
    process now and then (SIGABRT, python/cpython#87135), and a good run would count as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _join(backend: str, num_local: int) -> None:
    """Join the process group; after a restart, under names of this attempt's own.

    torchrun's agent keeps its store over restarts, and ranks would find the addresses of those
    that died (pytorch#135712). Only one machine's agent counts attempts alike for all ranks: on
    several, start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or num_local != int(os.environ["WORLD_SIZE"]):
        dist.init_process_group(backend)
        return
    store, rank, num_ranks = next(rendezvous("env://"))
    own = PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=num_ranks)


def mesh_of(plan: Plan, here: Session) -> DeviceMesh:
    """Return the plan's mesh over all ranks; UsageError when their number differs."""
    if plan.num_ranks != here.num_ranks:
        raise UsageError(
            f"the plan is for {plan.num_ranks} ranks and {here.num_ranks} were started",
            remedy=f"use torchrun --nproc-per-node {plan.num_ranks}",
        )
    return init_device_mesh(
        here.device.type,
        tuple(axis.size for axis in plan.mesh),
        mesh_dim_names=tuple(axis.name for axis in plan.mesh),
    )


def build(plan: Plan, here: Session, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the whole model on this rank, with the plan's seed: equal weights on every rank."""
    wanted = dtype or getattr(torch, plan.provenance.dtype)
    return models.load(plan.provenance.model).build(here.device, wanted, seed=plan.seed)


def example(
    plan: Plan, here: Session, *, batch: int, seed: int, dtype: torch.dtype | None = None
) -> Batch:
    """Return `batch` random samples of the plan's sizes, by input name; equal on every rank."""
    return _inputs(plan, batch, str(here.device), seed, dtype)


def _inputs(
    plan: Plan, batch: int, device: str, seed: int, dtype: torch.dtype | None = None
) -> Batch:
    model = models.load(plan.provenance.model)
    sizes: dict[str, Any] = {**plan.provenance.sizes, "batch": batch}
    wanted = dtype or getattr(torch, plan.provenance.dtype)
    args, kwargs = model.example(**sizes, device=device, seed=seed, dtype=wanted)
    bound = inspect.signature(model.build().forward).bind(*args, **kwargs)
    # Two levels: a transformers forward takes some of its inputs as **kwargs.
    named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def input_names(plan: Plan) -> tuple[str, ...]:
    """Return the names of the model's inputs, in the order of its call."""
    return tuple(example_shapes(plan))


def example_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the shape of each input of one sample, by name."""
    return {name: tuple(value.shape) for name, value in _inputs(plan, 1, "meta", 0).items()}


def global_batch(plan: Plan) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each input of a global batch, by name."""
    found = _inputs(plan, plan.provenance.sizes["batch"], "meta", 0)
    return {name: (tuple(value.shape), value.dtype) for name, value in found.items()}


def text_inputs(plan: Plan) -> tuple[str, str]:
    """Return the names of the model's two inputs, ids and targets of one shape.

    Raises UsageError for a model that takes something else, or fewer than 256 ids.
    """
    found = _inputs(plan, 1, "meta", 0)
    model = models.load(plan.provenance.model)
    ids = [name for name, value in found.items() if value.dtype == torch.int64]
    if len(found) != 2 or len(ids) != 2 or len({value.shape for value in found.values()}) != 1:
        raise UsageError(
            f"{model.name} takes {', '.join(found)}, and text gives ids and targets",
            remedy="copy recipes/train.py and give it samples of your own",
        )
    vocabulary = getattr(model.config, "vocab_size", None)
    if vocabulary is not None and vocabulary < text.VOCABULARY:
        raise UsageError(
            f"{model.name} knows {vocabulary} ids, and bytes need {text.VOCABULARY}",
            remedy=f"train a model with a vocabulary of at least {text.VOCABULARY}",
        )
    return ids[0], ids[1]


def prepare(plan: Plan, here: Session, *, dtype: torch.dtype | None = None) -> Lowered:
    """Build the model and lower the plan on this rank."""
    mesh = mesh_of(plan, here)
    place = here
    if ladder.rung(plan) == "schedule" and plan.provenance.model in models.names():
        # The zoo's initial weights go by name: a rank makes those of its own stages alone.
        place = replace(here, device=torch.device("meta"))
    return ladder.lower(
        plan,
        build(plan, place, dtype),
        mesh,
        Recorder(here.rank),
        example(plan, here, batch=plan.microbatch, seed=plan.seed, dtype=dtype),
    )


def optimizer_groups(lowered: Lowered) -> list[dict[str, Any]]:
    """Return what to give an optimizer of torch: parameters that lie alike, in a group each.

    torch's optimizers run over many tensors at once, which must all be whole or over one mesh.
    """
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in lowered.optimizer_parameters().values():
        key = type(parameter.data), getattr(parameter, "device_mesh", None)
        groups.setdefault(key, []).append(parameter)
    return [{"params": group} for group in groups.values()]


def timeline(lowered: Lowered, title: str) -> Timeline:
    """Gather every rank's spans into one measured timeline. All ranks must call this."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, lowered.recorder.spans)
    return Timeline(title, tuple(span for spans in gathered for span in spans))


def synchronise(lowered: Lowered) -> None:
    """Start all ranks' clocks together (they share the machine's monotonic clock, or nearly)."""
    dist.barrier()
    lowered.recorder.reset()
