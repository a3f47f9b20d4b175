"""Large models: traced without their memory, folded to one layer."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from toolkit import ir, models
from toolkit.ir import backward, show
from toolkit.models import llama

_TRACE = """
import json, resource, torch
torch.set_num_threads(1)
from toolkit import ir, models
from toolkit.ir import show
graph = ir.trace_model(models.load("llama3-70b"), dtype=torch.bfloat16)
rows = show.rows(graph)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "blocks": [b.num_instances for b in graph.blocks()],
                  "parameters": rows[0].totals.num_parameters}))
"""


@pytest.mark.slow
def test_llama_70b_traces_in_two_gib():
    done = subprocess.run(
        [sys.executable, "-c", _TRACE], capture_output=True, text=True, check=True, timeout=280
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["blocks"] == [80]
    assert found["parameters"] == models.load("llama3-70b").num_parameters
    assert found["peak"] < 2 * 1024**3


def test_three_layers_of_70b_take_no_memory_and_fold():
    config = dataclasses.replace(models.load("llama3-70b").config, num_layers=3)
    with torch.device("meta"):
        module = llama.build(config)
    ids = torch.zeros(2, 64, dtype=torch.long, device="meta")
    graph = ir.trace(module, (ids,), name="llama-70b-short")
    (block,) = graph.blocks()
    assert block.num_instances == 3
    (row,) = [row for row in show.rows(graph) if row.path == block.name]
    assert row.totals.num_parameters == 855_654_400
    # Two FLOPs a weight a token, but for the norms' weights; and attention over 64 positions.
    products = 2 * 128 * (855_654_400 - 2 * 8192)
    assert row.totals.forward_flops == products + 4 * 2 * 64 * 64 * 8192


def test_totals_of_folded_rows_add_up(subject):
    graph = subject("zoo:llama-tiny").graph
    (block,) = graph.blocks()
    rows = {row.path: row for row in show.rows(graph)}
    assert rows[block.name].times == 4
    assert rows["blocks"].totals.forward_flops == 4 * rows[block.name].totals.forward_flops
    assert rows["blocks"].totals.num_parameters == 4 * rows[block.name].totals.num_parameters
    saved = sum(kept.num_bytes for kept in backward.saved(graph))
    assert rows[""].totals.saved_bytes == saved
