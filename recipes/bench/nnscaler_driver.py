"""nnScaler's AutoDist on a GPT, in this process; plan_nnscaler.py starts it.

    python nnscaler_driver.py CHECKOUT SAMPLES MICROBATCHES WORK_DIR

There is no GPU here: operators are priced by this project's roofline for an H100 instead of being
run, and the tables of collectives are filled from this project's costs. Everything else, the
tracer, the divisions it knows, memory and both solvers, is nnScaler's. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TRACE_STRATEGY"] = "cpu"  # read when nnScaler is imported
_CHECKOUT, _SAMPLES, _MICROBATCHES = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
_WORK = Path(sys.argv[4])
sys.path[:0] = [str(_CHECKOUT), str(_CHECKOUT / "packages")]

import torch  # noqa: E402
from nnscaler import parallel  # noqa: E402
from nnscaler.autodist import apis  # noqa: E402
from nnscaler.autodist.autodist_config import AutoDistConfig  # noqa: E402
from nnscaler.autodist.cost_database import CostDatabase  # noqa: E402
from nnscaler.profiler import database  # noqa: E402
from plan_search import eight_layers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from toolkit.cost import collective, roofline  # noqa: E402
from toolkit.cost.work import Work  # noqa: E402
from toolkit.hardware import find_cluster  # noqa: E402

CLUSTER = "h100x8"
_ITEM = 2  # bytes of a bfloat16
_TABLES = {
    "all gather": "all_gather",
    "all reduce": "all_reduce",
    "reduce scatter": "reduce_scatter",
    "all to all": "all_to_all",
}
_VIEWS = ("view", "reshape", "transpose", "contiguous", "flatten", "getitem", "size", "identity")


class Summed(nn.Module):
    """The model on as many tokens as it has positions, without `arange`, which nnScaler would run
    on a GPU; its loss is a sum, which nnScaler can divide by tokens, as it cannot a mean.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        model = self.model
        hidden = model.token_embedding(data["ids_BT"]) + model.position_embedding.weight
        for block in model.blocks:
            hidden = block(hidden)
        logits = model.head(model.final_norm(hidden))
        flat = logits.view(-1, logits.size(-1))
        return cross_entropy(flat, data["targets_BT"].view(-1), reduction="sum")


def profiled(node: Any, *_: object, **__: object) -> tuple[float, float, int, Any, Any]:
    """What nnScaler's profiler returns of an operator (forward and backward in milliseconds, bytes
    of its workspace, of what is kept and which inputs that is), by the roofline.
    """
    device = find_cluster(CLUSTER).device(0)
    reads = [tensor for tensor in node.inputs() if hasattr(tensor, "byte_size")]
    writes = [tensor for tensor in node.outputs() if hasattr(tensor, "byte_size")]
    written = sum(tensor.nelement() for tensor in writes)
    kind, flops = "elementwise", 5.0 * written
    if "linear" in node.signature:
        kind, flops = "matmul", 2.0 * writes[0].nelement() * reads[0].shape[-1]
    elif "scaled_dot" in node.signature:
        tokens = reads[0].shape[-2]
        kind = "attention"
        flops = 2.0 * reads[0].nelement() * tokens  # causal: half of two products
    forward_ms = 0.0
    if not any(f".{view}" in node.signature for view in _VIEWS):
        work = Work(
            kind, flops=flops, dtype="bfloat16",
            read_bytes=_ITEM * sum(tensor.nelement() for tensor in reads),
            write_bytes=_ITEM * written,
        )  # fmt: skip
        forward_ms = 1e3 * roofline.seconds(work, device)
    kept = tuple(
        index
        for index, tensor in enumerate(node.inputs())
        if hasattr(tensor, "byte_size") and not tensor.is_param() and not tensor.is_buffer()
    )
    kept_bytes = tuple(node.inputs()[index].nelement() * _ITEM for index in kept)
    return forward_ms, 2 * forward_ms, _ITEM * written, kept_bytes, kept


def write_tables(folder: Path) -> None:
    """Write seconds of collectives by MiB as nnScaler reads them, for 2, 4 and 8 devices."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster = find_cluster(CLUSTER)
    sizes_mb = [2.0**power for power in range(-10, 13)]
    for num in (2, 4, 8):
        ranks = tuple(range(num))
        tables = {
            name: [
                sizes_mb,
                [collective.cost(kind, int(mb * 2**20), ranks, cluster).seconds for mb in sizes_mb],
            ]
            for name, kind in _TABLES.items()
        }
        (folder / f"intra_{num}.json").write_text(json.dumps(tables))


def stages(graph: Any, found: Any) -> list[dict[str, Any]]:
    """Each stage's devices, and how every kind of operator in it is divided: the index of an input,
    its dim and the number of parts, and how many operators are.
    """
    nodes = {node.cid: node for node in graph.nodes()}
    made = []
    for stage in found.desc.spmd_descs:
        counts: dict[tuple[str, str], int] = {}
        for cid, division in stage.partition_descs.items():
            ((where, parts),) = division.desc
            name = nodes[cid].signature.rpartition(".")[2]
            how = "whole" if parts == 1 or where[0] < 0 else f"input {where[0]} dim {where[1]}"
            counts[name, how] = counts.get((name, how), 0) + 1
        divided = [{"kind": k, "how": how, "count": n} for (k, how), n in counts.items()]
        made.append({"devices": stage.mesh_desc.ngpus, "divided": divided})
    return made


def main() -> None:
    database.profile = profiled
    profile = CostDatabase.profile_comp
    # It would profile on several GPUs at once.
    CostDatabase.profile_comp = lambda self, degree, _parallel, again: profile(
        self, degree, False, again
    )
    write_tables(_WORK / "profile" / "comm")
    model, _, example = eight_layers(_SAMPLES)
    example["ids_BT"] = example["ids_BT"].contiguous()
    example["targets_BT"] = example["targets_BT"].contiguous()
    began_s = time.perf_counter()
    graph, _ = parallel._gen_graph(
        Summed(model).to(torch.bfloat16), {"data": example}, str(_WORK),
        constant_folding=True, end2end_mode=True,
    )  # fmt: skip
    traced_s = time.perf_counter()
    config = AutoDistConfig(
        mesh_row=1, mesh_col=8, world_size=8, nproc=2, micro_batch_size=_SAMPLES,
        update_freq=_MICROBATCHES, pipeline_pivots="Block", pipeline_nstages="auto",
        max_pipeline_bubble_ratio=0.5, max_pipeline_unbalance_ratio=0.3, memory_constraint=70,
        memory_granularity=1024, profile_dir=str(_WORK / "profile"), parallel_profile=False,
        re_profile=True,
    )  # fmt: skip
    found = apis.calc_parallel_plan(graph, config)
    ended_s = time.perf_counter()
    result = {
        "samples": _SAMPLES,
        "microbatches": _MICROBATCHES,
        "trace_s": traced_s - began_s,
        "search_s": ended_s - traced_s,
        "own_estimate_s": found.e2e_time,
        "stages": stages(graph, found),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
