"""Checkpoints of a training run through torch.distributed.checkpoint, by module path.

A checkpoint holds each parameter and its two AdamW moments under the parameter's path in the
whole model, so a run may be resumed under another plan: DCP reshards on reading.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from toolkit import record
from toolkit.errors import UsageError
from toolkit.plan.lower.lowered import Lowered

_KIND, _VERSION = "training-checkpoint", 1
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FOLDER = re.compile(r"step-(\d{8})")


def save(
    folder: Path,
    step: int,
    lowered: Lowered,
    optimizer: torch.optim.Optimizer,
    about: dict[str, Any],
) -> Path:
    """Write `folder/step-<step>`; all ranks must call this. Returns its path.

    It is written under another name and renamed when it is whole, so a run that is killed while
    saving leaves the checkpoint before it. `about` (a JSON value) says what is being trained.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dcp_save(_state(lowered, optimizer), checkpoint_id=partial)
    if dist.get_rank() == 0:
        body = {"step": step, "about": about}
        record.write(partial / "about.json", kind=_KIND, version=_VERSION, body=body)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
    dist.barrier()
    return final


def latest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in `folder`, if there is one."""
    found = [path for path in folder.glob("step-*") if _FOLDER.fullmatch(path.name)]
    return max(found, default=None)


def load(
    path: Path, lowered: Lowered, optimizer: torch.optim.Optimizer, about: dict[str, Any]
) -> int:
    """Read a checkpoint into the model and optimizer; return its step. All ranks must call this.

    Raises UsageError when it is of another run (`about` differs) and FormatError when it is torn.
    """
    body = record.read(path / "about.json", kind=_KIND, version=_VERSION)["body"]
    for key, value in about.items():
        if body["about"].get(key) != value:
            raise UsageError(
                f"{path} is of a run with {key} {body['about'].get(key)!r}, and this run has "
                f"{value!r}",
                remedy="use another --checkpoint folder, or the settings of that run",
            )
    step = int(body["step"])
    for parameter in lowered.optimizer_parameters().values():
        moments = {name: torch.zeros_like(parameter) for name in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    state = _state(lowered, optimizer)
    dcp_load(state, checkpoint_id=path)
    lowered.restored()
    return step


def _state(lowered: Lowered, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state: dict[str, Any] = {
        name: parameter.detach() for name, parameter in lowered.parameters.items()
    }
    for name, parameter in lowered.optimizer_parameters().items():
        for moment in _MOMENTS:
            state[f"{name}#{moment}"] = lowered.saved(name, optimizer.state[parameter][moment])
    return state
