"""Greedy tokens and logits equal transformers' on the same weights, however they are scheduled."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from toolkit.errors import ToolkitError
from toolkit.serve.assemble import EngineSettings, build
from toolkit.serve.batch import Batch, Slice
from toolkit.serve.executor.device import Place
from toolkit.serve.model import weights
from toolkit.serve.model.cache import PagedKV
from toolkit.serve.model.decoder import Decoder
from toolkit.serve.model.inputs import prepare
from toolkit.serve.model.native import NativeDecoder
from toolkit.serve.model.tokenizer import Tokenizer
from toolkit.serve.request import Phase, Request, SamplingParams

sys.path.append(str(Path(__file__).parent))
from greedy import check, generate, greedy

NUM_TOKENS = 16
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Gravity is the force by which a planet or other body draws objects toward its center. It "
    "keeps the planets in orbit around the sun, and the moon in orbit around the earth. Anything "
    "that has mass also has gravity, and objects with more mass have more of it. Its pull weakens",
)


@pytest.fixture(scope="session")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text) for text in PROMPTS]


@pytest.fixture(scope="session")
def expected(reference: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [greedy(reference, ids, NUM_TOKENS) for ids in prompts]


def test_one_at_a_time(make_engine: Any, reference: Any, prompts: Any, expected: Any) -> None:
    engine = make_engine()
    ours = [generate(engine, [ids], NUM_TOKENS)[0] for ids in prompts]
    check(reference, prompts, ours, expected)


@pytest.mark.parametrize("policy", ["fcfs", "spf"])
def test_batched(
    make_engine: Any, reference: Any, prompts: Any, expected: Any, policy: str
) -> None:
    engine = make_engine(policy=policy)
    check(reference, prompts, generate(engine, prompts, NUM_TOKENS), expected)


@pytest.mark.parametrize(("step_tokens", "block_size"), [(7, 16), (13, 5)])
def test_chunked_at_odd_sizes(
    make_engine: Any, reference: Any, prompts: Any, expected: Any, step_tokens: int, block_size: int
) -> None:
    engine = make_engine(step_tokens=step_tokens, block_size=block_size, max_batch=4)
    check(reference, prompts, generate(engine, prompts, NUM_TOKENS), expected)
    chunks = [span for span in engine.timeline().spans if span.track == "prefill"]
    assert len(chunks) > len(prompts)


def test_after_preemption(make_engine: Any, reference: Any, prompts: Any, expected: Any) -> None:
    longest = max(map(len, prompts)) + NUM_TOKENS
    total = sum(len(ids) + NUM_TOKENS for ids in prompts)
    tokens = (longest + total) // 2 // 8 * 8
    engine = make_engine(
        block_size=8, kv_bytes=tokens * 46_080, max_context=longest, max_batch=4, step_tokens=64
    )
    check(reference, prompts, generate(engine, prompts, NUM_TOKENS), expected)
    assert engine.scheduler.num_preemptions > 0


def test_with_part_of_the_prompt_in_the_cache(
    make_engine: Any, reference: Any, prompts: Any, expected: Any
) -> None:
    engine = make_engine(block_size=8, step_tokens=40, max_batch=4)
    for ids in prompts:
        generate(engine, [ids[: len(ids) * 2 // 3]], 1)
    check(reference, prompts, generate(engine, prompts, NUM_TOKENS), expected)
    assert engine.scheduler.tables.num_hit >= 32


def step_logits(
    decoder: Decoder | NativeDecoder, cache: PagedKV, pieces: list[Slice]
) -> torch.Tensor:
    return decoder.forward(prepare(Batch(1, tuple(pieces)), cache.block_size), cache)


def test_logits(smollm2: Any, reference: Any, prompts: Any) -> None:
    """Prefill whole, prefill in two chunks, then decode: each within rounding of transformers."""
    _, decoder = smollm2
    ids = prompts[3]
    with torch.inference_mode():
        wanted = reference(torch.tensor([ids])).logits[0]
    cache = decoder.make_cache(32, 8)
    whole = Request("whole", tuple(ids[:-1]), SamplingParams(), block_ids=list(range(15, -1, -1)))
    split = Request("split", tuple(ids[:-1]), SamplingParams(), block_ids=list(range(16, 32)))
    last = len(ids) - 1
    step_logits(decoder, cache, [Slice(split, Phase.PREFILL, 0, 11)])
    pair = step_logits(
        decoder,
        cache,
        [Slice(whole, Phase.PREFILL, 0, last), Slice(split, Phase.PREFILL, 11, last)],
    )
    assert (pair - wanted[last - 1]).abs().max() < 1e-3
    for request in (whole, split):
        request.output_ids.append(ids[last])
    pair = step_logits(
        decoder,
        cache,
        [Slice(request, Phase.DECODE, last, last + 1) for request in (whole, split)],
    )
    assert (pair - wanted[last]).abs().max() < 1e-3


TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 128,
}
TINY_GPT2 = {"n_embd": 48, "n_inner": 80, "n_layer": 3, "n_head": 6, "vocab_size": 99}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _no_compiler(*_: Any, **__: Any) -> None:
    raise ToolkitError("there is no C++ compiler")


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TINY),
        LlamaConfig(**TINY, tie_word_embeddings=True, attention_bias=True, head_dim=10),
        LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE),
        LlamaConfig(
            **TINY, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        ),
        MistralConfig(**TINY, sliding_window=64),
        Qwen2Config(**TINY),
        Qwen3Config(**TINY, head_dim=16),
        GPT2Config(**TINY_GPT2, n_positions=128),
        GPT2Config(**TINY_GPT2, n_positions=128, tie_word_embeddings=False),
    ],
    ids=[
        "llama",
        "llama-biased-tied",
        "llama3-rope",
        "linear-rope",
        "mistral",
        "qwen2",
        "qwen3",
        "gpt2",
        "gpt2-untied",
    ],
)
@pytest.mark.parametrize("path", ["kernels", "torch", "torch without oneDNN", "as on a GPU"])
def test_other_architectures(
    config: Any, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_gpu: Place
) -> None:
    if path.startswith("torch"):
        monkeypatch.setattr("toolkit.serve.model.quantisation.NativeDecoder", _no_compiler)
    if path == "torch without oneDNN":
        monkeypatch.setattr("toolkit.serve.model.linear._has_packed_products", lambda: False)
    torch.manual_seed(7)
    theirs = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    for name, parameter in theirs.named_parameters():
        # The default initialisation is so small that any mistake would hide in the residual.
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.eval().save_pretrained(tmp_path)
    model = weights.load(tmp_path)
    engine, executor = build(
        model,
        EngineSettings(kv_bytes=2**22, threads=1, step_tokens=9, max_batch=3, block_size=4),
        fake_gpu if path == "as on a GPU" else None,
    )
    executor.start()
    prompts = [[5, 17, 3, 88, 41, 2, 9, 60, 12, 33, 71], [1], [90, 4, 4, 18]]
    wanted = [greedy(theirs, ids, 20) for ids in prompts]
    check(theirs, prompts, generate(engine, prompts, 20), wanted)
    check(theirs, prompts[:1], generate(engine, prompts[:1], 20), wanted[:1])
    engine.scheduler.check_integrity()
