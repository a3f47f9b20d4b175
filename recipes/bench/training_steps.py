"""What plan_against.py compares, each as one would write it: a training step on one rank.

Every maker takes the searched plan (for the model, its sizes, its batch and blocks) and returns a
step of AdamW in float32; keyword arguments are what a variant is tuned by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from toolkit.models.evoformer import Evoformer
from toolkit.plan import runtime
from toolkit.plan.lower.lowered import loss_of
from toolkit.plan.plan import Plan

Step = Callable[[], None]


def _inputs(plan: Plan, here: runtime.Session) -> dict[str, Tensor]:
    sizes = plan.provenance.sizes
    return dict(runtime.example(plan, here, batch=sizes["batch"], seed=1))


def _own_part(batch: dict[str, Tensor], here: runtime.Session) -> dict[str, Tensor]:
    return {name: value.chunk(here.num_ranks)[here.rank] for name, value in batch.items()}


def _pieces(batch: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    cut = {name: value.chunk(count) for name, value in batch.items()}
    return [{name: values[i] for name, values in cut.items()} for i in range(count)]


def _recompute(module: nn.Module, blocks: tuple[str, ...]) -> None:
    for path in blocks:
        block = module.get_submodule(path)
        forward = block.forward
        block.forward = lambda *a, _f=forward, **k: checkpoint(_f, *a, use_reentrant=False, **k)  # type: ignore[method-assign]


def _blocks(plan: Plan) -> tuple[str, ...]:
    return tuple(path for stage in plan.stages for path in stage.blocks)


def _adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-3)


def ddp(
    plan: Plan,
    here: runtime.Session,
    accumulate: int = 1,
    recompute: bool = False,
    views: bool = False,
) -> Step:
    """`views`: gradients are views of DDP's buckets, which spares a copy of them."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    accelerator = Accelerator(
        cpu=here.device.type == "cpu",
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=views)],
    )
    module = runtime.build(plan, here)
    if recompute:
        _recompute(module, _blocks(plan))
    module, optimizer = accelerator.prepare(module, _adamw(module.parameters()))
    pieces = _pieces(_own_part(_inputs(plan, here), here), accumulate)

    def step() -> None:
        for piece in pieces:
            with accelerator.accumulate(module):
                accelerator.backward(loss_of(module(**piece)))
                optimizer.step()
                optimizer.zero_grad()

    return step


def fsdp2(plan: Plan, here: runtime.Session, accumulate: int = 1, recompute: bool = False) -> Step:
    from torch.distributed.fsdp import fully_shard

    module = runtime.build(plan, here)
    if recompute:
        _recompute(module, _blocks(plan))
    for path in _blocks(plan):
        fully_shard(module.get_submodule(path))
    fully_shard(module)
    optimizer = _adamw(module.parameters())
    pieces = _pieces(_own_part(_inputs(plan, here), here), accumulate)

    def step() -> None:
        optimizer.zero_grad()
        for index, piece in enumerate(pieces):
            module.set_requires_gradient_sync(index + 1 == len(pieces))
            (loss_of(module(**piece)) / len(pieces)).backward()
        optimizer.step()

    return step


def one_f_one_b(plan: Plan, here: runtime.Session, microbatches: int = 4, cut: str = "") -> Step:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, SplitPoint, pipeline

    module = runtime.build(plan, here)
    given, *targets = _inputs(plan, here).values()
    if isinstance(module, Evoformer):  # torch's tracer does not split it
        half = _half(module, int(cut.split(".")[1]), here.rank)
        stage: Any = PipelineStage(half, here.rank, here.num_ranks, here.device)
    else:
        example = given[: len(given) // microbatches]
        pipe = pipeline(module, (example,), split_spec={cut: SplitPoint.BEGINNING})
        stage = pipe.build_stage(here.rank, here.device)
    optimizer = _adamw(stage.submod.parameters())

    def loss(outputs: Any, samples: Tensor) -> Tensor:
        return _LOSSES[len(targets)](outputs, *(target[samples] for target in targets))

    schedule = Schedule1F1B(stage, microbatches, loss_fn=loss)
    samples = torch.arange(len(given))

    def step() -> None:
        optimizer.zero_grad()
        if here.rank == 0:
            schedule.step(given)
        else:
            schedule.step(target=samples, losses=[], return_outputs=False)
        optimizer.step()

    return step


class _Front(nn.Module):
    """An Evoformer of one pass up to a block."""

    def __init__(self, module: Evoformer, cut: int) -> None:
        super().__init__()
        self.embedding, self.recycling = module.embedding, module.recycling
        self.nothing_yet = module.nothing_yet
        self.blocks = module.blocks[:cut]

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        msa, pair = self.recycling(*self.embedding(ids), *self.nothing_yet(ids))
        for block in self.blocks:
            msa, pair = block(msa, pair)
        return msa, pair


class _Back(nn.Module):
    """The rest of it."""

    def __init__(self, module: Evoformer, cut: int) -> None:
        super().__init__()
        self.blocks = module.blocks[cut:]
        self.final_norm, self.residue_head = module.final_norm, module.residue_head
        self.distance_head = module.distance_head

    def forward(self, msa: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            msa, pair = block(msa, pair)
        distance = self.distance_head(pair)
        return self.residue_head(self.final_norm(msa)), distance + distance.transpose(1, 2)


def _half(module: Evoformer, cut: int, rank: int) -> nn.Module:
    return (_Back if rank else _Front)(module, cut)


def _one_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, -2), targets.flatten())


def _evoformer_loss(outputs: tuple[Tensor, Tensor], residues: Tensor, bins: Tensor) -> Tensor:
    return 2.0 * _one_loss(outputs[0], residues) + 0.3 * _one_loss(outputs[1], bins)


# What the models compute of their targets themselves, where they are given any.
_LOSSES: dict[int, Callable[..., Tensor]] = {1: _one_loss, 2: _evoformer_loss}


def ours(plan: Plan, here: runtime.Session) -> Step:
    lowered = runtime.prepare(plan, here)
    batch = _inputs(plan, here)
    groups: dict[type, list[nn.Parameter]] = {}
    for parameter in lowered.optimizer_parameters().values():
        groups.setdefault(type(parameter.data), []).append(parameter)
    optimizer = _adamw([{"params": group} for group in groups.values()])

    def step() -> None:
        lowered.zero_gradients()
        lowered.step(batch)
        optimizer.step()
        lowered.after_update()

    return step


MAKERS: dict[str, Callable[..., Step]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "1f1b": one_f_one_b,
    "toolkit": ours,
}
