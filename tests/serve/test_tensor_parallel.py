"""Tensor parallelism from a plan: the same tokens as one process; a lost rank is said, not waited
for."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from toolkit import record
from toolkit.errors import FormatError, InfeasibleError, ToolkitError, UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import io, library, subject
from toolkit.serve import tensor_plan
from toolkit.serve.assemble import EngineSettings, load
from toolkit.serve.engine import Engine
from toolkit.serve.executor.tensor_parallel import TensorParallelExecutor
from toolkit.serve.model import gpt2, weights
from toolkit.serve.model.part import Part
from toolkit.serve.request import Request, SamplingParams

PROMPTS = ((5, 17, 3, 88, 41, 2, 9, 60, 12, 33, 71), (1,), (90, 4, 4, 18))


SETTINGS = EngineSettings(
    kv_bytes=2**20, threads=2, step_tokens=9, max_batch=3, block_size=4, max_context=64
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        # As many as the plan is for.
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        # Odd, so that the last rank's share of the head is filled up.
        vocab_size=99,
        max_position_embeddings=128,
        attention_bias=True,
        tie_word_embeddings=True,
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made = tmp_path_factory.mktemp("model")
    model.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def traced() -> subject.Subject:
    return subject.load("llama-tiny", batch=8, tokens=32)


@pytest.fixture(scope="module")
def plan(traced: subject.Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan as the planner writes one."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    io.save(library.find("tp")(traced, find_cluster("cpux2")), path)
    return path


def altered(plan: Path, to: Path, **changes: Any) -> Path:
    body = json.loads(plan.read_text())["body"] | changes
    record.write(to / "plan.json", kind="plan", version=2, body=body)
    return to / "plan.json"


def generate(engine: Engine) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    requests = [Request(f"r{i}", ids, sampling) for i, ids in enumerate(PROMPTS)]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    return [request.output_ids for request in requests]


@pytest.fixture
def ranks(folder: Path, plan: Path) -> Iterator[tuple[Engine, TensorParallelExecutor]]:
    """Two gloo ranks, this process the first."""
    engine, executor = load(folder, replace(SETTINGS, plan=plan))
    assert isinstance(executor, TensorParallelExecutor)
    executor.start()
    yield engine, executor
    executor.close()


def test_two_ranks_draw_the_tokens_of_one(folder: Path, ranks: Any) -> None:
    engine, executor = ranks
    alone, single = load(folder, SETTINGS)
    single.start()
    assert generate(engine) == generate(alone)
    means = []
    for each in (engine, alone):
        each.add(Request("pooled", PROMPTS[0], SamplingParams(max_tokens=1), pooled=True))
        means += [o.hidden_mean for _ in range(2) for o in each.step().outputs]
    assert means[0] == pytest.approx(means[1], abs=1e-4)
    assert executor.decoder.weight_bytes < single.decoder.weight_bytes


def test_a_lost_rank_is_named_and_a_successor_starts_it_anew(ranks: Any) -> None:
    engine, executor = ranks
    wanted = generate(engine)
    pid = executor._followers._processes[0].pid
    # Within a step: it leaves the other waiting in a sum, and then is gone.
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(ToolkitError, match="rank 1 of 2 was ended by SIGKILL"):
        generate(engine)
    after = engine.successor()
    after.executor.start()
    try:
        assert generate(after) == wanted
        # Between steps: nobody waits for it yet.
        os.kill(after.executor._followers._processes[0].pid, signal.SIGKILL)
        with pytest.raises(ToolkitError, match="rank 1 of 2 was ended by SIGKILL"):
            generate(after)
    finally:
        after.executor.close()


def test_parts_make_the_whole(folder: Path) -> None:
    whole = weights.load(folder)
    parts = [weights.load(folder, part=Part(rank, 2)) for rank in range(2)]
    for name, dim in (("q_proj", 0), ("k_proj", 0), ("o_proj", 1)):
        key = f"layers.1.self_attn.{name}.weight"
        joined = torch.cat([part.weights[key] for part in parts], dim=dim)
        assert torch.equal(joined, whole.weights[key])
    bias = "layers.0.self_attn.o_proj.bias"
    assert torch.equal(parts[0].weights[bias] + parts[1].weights[bias], whole.weights[bias])
    head = torch.cat([part.weights["lm_head.weight"] for part in parts])
    assert torch.equal(head[:99], whole.weights["embed_tokens.weight"])
    assert parts[1].config.num_kv_heads == 1
    with pytest.raises(InfeasibleError, match="degree 3 does not divide num_kv_heads 2"):
        weights.load(folder, part=Part(0, 3))
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_size": 64, "vocab_size": 99}
    other = gpt2.describe(**sizes, max_context=64, norm_eps=1e-5, tied_head=True)
    with pytest.raises(InfeasibleError, match="architecture gpt2 is not divided"):
        Part(0, 2).config(other)


@pytest.mark.parametrize(
    ("strategy", "ranks", "degrees", "refusal"),
    [
        ("tp", 2, {}, ""),
        ("tp-sp", 2, {}, ""),
        ("grid", 2, {"tensor": 2}, ""),
        ("1f1b", 2, {}, "2 ranks into stages of a pipeline"),
        ("dp", 2, {}, "2 ranks into copies of the model"),
        ("fsdp-tp", 4, {}, "2 ranks into copies of the model"),
        ("co-shard", 1, {}, "splits nothing over a tensor axis"),
    ],
)
def test_what_is_read_of_a_plan(
    traced: subject.Subject,
    tmp_path: Path,
    strategy: str,
    ranks: int,
    degrees: dict[str, int],
    refusal: str,
) -> None:
    write = library.find(strategy)
    io.save(
        write(traced, find_cluster("h100x8"), num_ranks=ranks, **degrees), tmp_path / "plan.json"
    )
    if refusal:
        with pytest.raises(InfeasibleError, match=refusal):
            tensor_plan.read(tmp_path / "plan.json")
    else:
        found = tensor_plan.read(tmp_path / "plan.json")
        assert found == tensor_plan.TensorPlan("llama-tiny", 2, 4)
        with pytest.raises(InfeasibleError, match="4 blocks, and the model served has 30"):
            found.check(30)


def test_plans_of_other_names_are_read_and_altered_ones_refused(
    folder: Path, plan: Path, tmp_path: Path
) -> None:
    body = json.loads(plan.read_text())["body"]
    co_shard = {"ops": "*", "dim": "n", "axis": None, "parts": 2}
    # transformers calls the same Linears otherwise.
    renamed = json.dumps(body["placements"])
    for ours, theirs in (
        ("blocks", "model.layers"),
        ("attention.output", "self_attn.o_proj"),
        ("attention.query", "self_attn.q_proj"),
        ("ffn.gate", "mlp.gate_proj"),
    ):
        renamed = renamed.replace(ours, theirs)
    stages = [body["stages"][0] | {"blocks": [f"model.layers.{i}" for i in range(4)]}]
    theirs = altered(plan, tmp_path, placements=json.loads(renamed), stages=stages)
    assert tensor_plan.read(theirs).num_blocks == 4
    for changes, error, words in (
        ({"placements": body["placements"][:-1]}, InfeasibleError, "splits 6 Linears of"),
        ({"splits": [co_shard]}, InfeasibleError, "co-shards"),
        ({"mesh": None}, FormatError, "lacks or mistakes"),
    ):
        with pytest.raises(error, match=words):
            tensor_plan.read(altered(plan, tmp_path, **changes))
    with pytest.raises(UsageError, match="--quantize int8 is for"):
        load(folder, replace(SETTINGS, plan=plan, quantize="int8"))
    with pytest.raises(UsageError, match="no such file"):
        load(folder, replace(SETTINGS, plan=tmp_path / "none.json"))
