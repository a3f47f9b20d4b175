"""The GPU's executor: on a CPU with a faked graph, and on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from toolkit.errors import UsageError
from toolkit.serve.assemble import EngineSettings, build, place_of
from toolkit.serve.batch import Batch, Slice
from toolkit.serve.engine import Engine, Output
from toolkit.serve.executor import cuda
from toolkit.serve.executor.device import DeviceExecutor, Place
from toolkit.serve.model.config import DecoderConfig
from toolkit.serve.model.inputs import prepare
from toolkit.serve.model.loaded import LoadedModel, expected
from toolkit.serve.request import Phase, Request, SamplingParams

SETTINGS = EngineSettings(
    threads=1, kv_bytes=2**20, max_batch=11, step_tokens=24, block_size=4, max_context=64
)
PROMPTS = [[(7 * i + j * j) % 90 for j in range(1 + 3 * i % 17)] for i in range(11)]


def model() -> LoadedModel:
    config = DecoderConfig("llama", 2, 32, 6, 2, 16, 48, 97, 64, 1e-5, 10_000.0, qk_norm=True)
    draw = torch.Generator().manual_seed(11)
    tensors = {
        name: torch.randn(shape, generator=draw) * 0.3 for name, shape in expected(config).items()
    }
    return LoadedModel(config, tensors, frozenset({96}))


def made(place: Place | None, **changes: Any) -> tuple[Engine, Any]:
    engine, executor = build(model(), replace(SETTINGS, **changes), place)
    executor.start()
    return engine, executor


def served(engine: Engine, requests: list[Request]) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step().outputs:
            outputs[output.request.id].append(output)
    engine.scheduler.check_integrity()
    return outputs


def greedy(engine: Engine) -> list[list[int]]:
    # Of different lengths, so that the batch shrinks through every bucket.
    requests = [
        Request(f"r{i}", tuple(ids), SamplingParams(max_tokens=6 + 3 * i, ignore_eos=True))
        for i, ids in enumerate(PROMPTS)
    ]
    served(engine, requests)
    return [request.output_ids for request in requests]


def test_tokens_equal_those_of_the_cpu_in_every_bucket(fake_gpu: Place) -> None:
    wanted = greedy(made(None)[0])
    engine, executor = made(fake_gpu)
    assert greedy(engine) == wanted
    played = {size: recording.replays for size, (recording, _) in executor._recordings.items()}
    assert set(played) == {1, 2, 4, 8, 16}
    assert all(played.values()), played


def test_tokens_survive_preemption_shared_prefixes_and_a_successor(fake_gpu: Place) -> None:
    wanted = greedy(made(None)[0])
    engine, _ = made(fake_gpu, kv_bytes=24 * 4 * 2 * 2 * 2 * 16 * 4)
    assert greedy(engine) == wanted
    assert engine.scheduler.num_preemptions > 0
    engine, _ = made(fake_gpu)
    for _ in range(2):
        assert greedy(engine) == wanted
    assert engine.scheduler.tables.num_hit > 0
    after = engine.successor()
    after.executor.start()
    assert greedy(after) == wanted


def test_scores_and_embeddings_equal_those_of_the_cpu(fake_gpu: Place) -> None:
    params = SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    drawn = SamplingParams(max_tokens=9, temperature=0.8, top_p=0.9, seed=4, ignore_eos=True)
    found = []
    for place in (None, fake_gpu):
        scored = Request("scored", tuple(PROMPTS[5]), params)
        pooled = Request("pooled", tuple(PROMPTS[4]), SamplingParams(max_tokens=1), pooled=True)
        random = Request("random", tuple(PROMPTS[3]), drawn)
        outputs = served(made(place)[0], [scored, pooled, random])
        scores = [*outputs["scored"][0].prompt_scores, *(o.score for o in outputs["scored"])]
        found.append((scores, outputs["pooled"][0].hidden_mean, random.output_ids))
    (ours, mean, ids), (theirs, their_mean, their_ids) = found
    assert ids == their_ids
    assert [(s.token_id, s.rank) for s in ours] == [(s.token_id, s.rank) for s in theirs]
    assert [s.logprob for s in ours] == pytest.approx([s.logprob for s in theirs], abs=1e-4)
    assert mean == pytest.approx(their_mean, abs=1e-4)


def test_padding_writes_to_a_block_of_its_own(fake_gpu: Place) -> None:
    _, executor = made(fake_gpu)
    requests = [
        Request(f"r{i}", (5, 6, 7), SamplingParams(), block_ids=[block])
        for i, block in enumerate((3, 9, 1))
    ]
    # A bucket of 4: one row too many.
    batch = Batch(1, tuple(Slice(request, Phase.DECODE, 2, 3) for request in requests))
    for pool in executor.cache.keys:
        pool.fill_(7.0)
    executor.compute(prepare(batch, 4))
    changed = {
        (int(block), int(offset))
        for pool in executor.cache.keys
        for block, _, offset, _ in (pool != 7.0).nonzero()
    }
    assert changed == {(3, 2), (9, 2), (1, 2), (executor.room.num_blocks, 0)}


def test_devices_and_types_that_cannot_be_had_are_refused() -> None:
    for settings, words in (
        (EngineSettings(device="tpu"), "unknown device 'tpu'"),
        (EngineSettings(device="cuda", dtype="int3"), "unknown dtype"),
        (EngineSettings(dtype="bfloat16"), "the CPU computes in float32"),
        (
            EngineSettings(device="cuda", quantize="int8"),
            "--quantize int8 is for the CPU's own kernels",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            place_of(settings)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="1 CUDA device wanted"):
            place_of(EngineSettings(device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_tokens_on_a_gpu_equal_those_of_the_cpu() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    wanted = greedy(made(None)[0])
    engine, executor = made(cuda.place(torch.float32))
    assert isinstance(executor, DeviceExecutor)
    assert greedy(engine) == wanted
