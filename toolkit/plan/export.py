"""Writing a plan as another tool's configuration, where that tool can express it.

torchtitan (its TOML configurations: [parallelism], [activation_checkpoint], [training]) takes
meshes of pipeline, data, context and tensor axes; accelerate takes data parallel and FSDP2. What
neither has (split operators, co-shard, interlaced, passes without gradient) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.errors import UsageError, require, unknown_name
from toolkit.plan.order import families
from toolkit.plan.order.action import write
from toolkit.plan.plan import Plan

FORMATS = ("torchtitan", "accelerate")

# Families of order/ -> the classes of torch.distributed.pipelining, which both tools name.
_SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "looped-bfs": "LoopedBFS",
    "zb-v": "ZBVZeroBubble",
    "dualpipe-v": "DualPipeV",
}


@dataclass(frozen=True)
class Export:
    """Files by name, and the command that uses them."""

    files: dict[str, str]
    command: str


def export(plan: Plan, form: str, classes: Mapping[str, str]) -> Export:
    """Return `plan` in another tool's form; UsageError when that tool cannot express it.

    `classes` are the class names of the model's modules by path (`OpGraph.modules`).
    """
    check(plan, form)
    return _torchtitan(plan) if form == "torchtitan" else _accelerate(plan, classes)


def check(plan: Plan, form: str) -> None:
    """Raise UsageError for an unknown form, and for what only this toolkit runs."""
    if form not in FORMATS:
        raise unknown_name("format", form, FORMATS)
    reasons = []
    if plan.splits:
        reasons.append(f"splits operators one by one ({plan.splits[0].ops}, ...)")
    if any(len(stage.devices) > 1 for stage in plan.stages):
        reasons.append("runs a stage on several positions of the pipeline")
    if any(stage.no_grad for stage in plan.stages):
        reasons.append("has passes without gradient")
    if plan.offload == "optimizer":
        reasons.append("updates on the host what stays on the device")
    if reasons:
        raise UsageError(
            f"{form} cannot express this plan: it {' and '.join(reasons)}",
            remedy="run it here: torchrun ... recipes/train.py --plan plan.json",
        )


def _torchtitan(plan: Plan) -> Export:
    for how in ("shard_optimizer", "shard_gradients"):
        if plan.placed(how):
            raise UsageError(
                f"torchtitan has no {how.replace('_', ' ')}: it replicates or shards everything",
                remedy="plan with fsdp or hsdp to export",
            )
    sharded = bool(plan.placed("shard"))
    data = plan.size("data")
    parallelism: dict[str, Any] = {
        "data_parallel_replicate_degree": plan.size("replica") * (1 if sharded else data),
        "data_parallel_shard_degree": data if sharded else 1,
        "tensor_parallel_degree": plan.size("tensor"),
        "context_parallel_degree": plan.size("context"),
        "pipeline_parallel_degree": plan.size("pipeline"),
    }
    files: dict[str, str] = {}
    if plan.size("pipeline") > 1:
        parallelism["pipeline_parallel_microbatch_size"] = plan.microbatch
        starts = [stage.begins_at for stage in plan.stages[1:]]
        parallelism["pipeline_parallel_split_points"] = starts
        if _is_family(plan):
            parallelism["pipeline_parallel_schedule"] = _SCHEDULES[plan.schedule]
        else:
            files["schedule.csv"] = write(plan.order) + "\n"
            parallelism["pipeline_parallel_schedule"] = "PipelineScheduleMulti"
            parallelism["pipeline_parallel_schedule_csv"] = "schedule.csv"
    sizes = plan.provenance.sizes
    training: dict[str, Any] = {
        "local_batch_size": plan.rank_batch if plan.size("pipeline") > 1 else plan.microbatch,
        "global_batch_size": sizes["batch"],
    }
    if "tokens" in sizes:
        training["seq_len"] = sizes["tokens"]
    if plan.offload == "parameters":
        training["enable_cpu_offload"] = True
    mode = "full" if plan.recompute else "none"
    tables = {
        "training": training,
        "parallelism": parallelism,
        "activation_checkpoint": {"mode": mode},
    }
    files["torchtitan.toml"] = _head(plan) + "\n".join(map(_table, tables, tables.values()))
    command = (
        f"torchrun --nproc-per-node {plan.num_ranks} -m torchtitan.train "
        "--job.config_file torchtitan.toml"
    )
    return Export(files, command)


def _is_family(plan: Plan) -> bool:
    """Whether torch's own class of that name makes this very table."""
    if plan.schedule not in _SCHEDULES:
        return False
    made = families.build(plan.schedule, plan.size("pipeline"), plan.microbatches)
    return made.rows == plan.order and made.placement == plan.table.placement


def _accelerate(plan: Plan, classes: Mapping[str, str]) -> Export:
    yaml = require("yaml", extra="train")
    inner = [axis.name for axis in plan.mesh if axis.size > 1 and axis.name in ("pipeline",)]
    ways = {entry.how for entry in plan.placements} - {"replicate", "shard"}
    if inner or ways:
        what = ", ".join(sorted({*inner, *ways}))
        raise UsageError(
            f"accelerate's configuration cannot express {what}",
            remedy="export to torchtitan, or run it with recipes/train.py",
        )
    sharded = bool(plan.placed("shard"))
    body: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP" if sharded else "MULTI_GPU",
        "num_machines": 1,
        "num_processes": plan.num_ranks,
        "mixed_precision": "bf16" if plan.provenance.dtype == "bfloat16" else "no",
    }
    if sharded:
        body["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": True,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": ",".join(
                dict.fromkeys(classes[path] for path in plan.placed("shard") if path)
            ),
            "fsdp_activation_checkpointing": bool(plan.recompute),
            "fsdp_offload_params": plan.offload == "parameters",
        }
    if plan.size("replica") > 1 or plan.size("context") > 1:
        body["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": plan.size("replica"),
            "parallelism_config_dp_shard_size": plan.size("data"),
            "parallelism_config_cp_size": plan.size("context"),
            "parallelism_config_tp_size": plan.size("tensor"),
        }
    accumulation = f" # in the script: Accelerator(gradient_accumulation_steps={plan.microbatches})"
    command = "accelerate launch --config_file accelerate.yaml YOUR_SCRIPT.py"
    text = _head(plan) + yaml.safe_dump(body, sort_keys=False)
    return Export(
        {"accelerate.yaml": text}, command + (accumulation if plan.microbatches > 1 else "")
    )


def _head(plan: Plan) -> str:
    came = plan.provenance
    predicted = plan.prediction
    step = f"; predicted step {predicted.step_s:.4g} s" if predicted else ""
    return f"# {came.model} on {came.cluster}, {plan.num_ranks} ranks, {plan.strategy}{step}\n"


def _table(name: str, values: dict[str, Any]) -> str:
    lines = [f"{key} = {_value(value)}" for key, value in values.items()]
    return "\n".join([f"[{name}]", *lines, ""])


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)
