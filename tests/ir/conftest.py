"""Small models traced once for the whole session: the zoo's tiny ones and transformers' own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch

from toolkit import ir, models
from toolkit.ir import capture

# transformers prints each model's generation settings otherwise.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@dataclass(frozen=True)
class Subject:
    """A traced model, and how to make it for real with inputs to call it with."""

    name: str
    graph: ir.OpGraph
    build: Callable[[str], torch.nn.Module]  # device -> module in training mode
    example: Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]]  # device -> args, kwargs

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors among the inputs, by the names they have in the graph."""
        leaves = capture.leaf_names(self.build("meta"), args, kwargs)
        return {name: leaf for name, leaf in leaves if isinstance(leaf, torch.Tensor)}


ZOO = ("gpt-tiny", "llama-tiny", "swin-nano", "t5-tiny", "evoformer-tiny")
TRANSFORMERS = ("gpt2", "llama", "qwen2", "swin", "vit", "bert", "t5")


@lru_cache
def zoo(name: str) -> Subject:
    model = models.load(name)
    sizes = {size: 2 if size == "batch" else min(value, 32) for size, value in model.sizes.items()}

    def build(device: str) -> torch.nn.Module:
        return model.build(device).train()

    if name.startswith("evoformer"):
        # Three sizes in pairs of pairs take export long; test_scale varies them, being slow.
        args, kwargs = model.example(**sizes)
        graph = ir.trace(build("meta"), args, kwargs, name=name, axes={})
    else:
        graph = ir.trace_model(model, **sizes)
    return Subject(name, graph, build, lambda device: model.example(**sizes, device=device))


_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
          "intermediate_size": 64, "vocab_size": 100}  # fmt: skip


def _config(name: str) -> tuple[str, Any]:
    import transformers as t

    return {
        "gpt2": ("GPT2LMHeadModel", lambda: t.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64,
            bos_token_id=1, eos_token_id=2)),
        "llama": ("LlamaForCausalLM", lambda: t.LlamaConfig(**_SMALL, num_key_value_heads=2)),
        "qwen2": ("Qwen2ForCausalLM", lambda: t.Qwen2Config(**_SMALL, num_key_value_heads=2)),
        "swin": ("SwinForImageClassification", lambda: t.SwinConfig(
            image_size=64, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
            window_size=4)),
        "vit": ("ViTForImageClassification", lambda: t.ViTConfig(
            **{**_SMALL, "image_size": 32, "patch_size": 8})),
        "bert": ("BertForMaskedLM", lambda: t.BertConfig(**_SMALL)),
        "t5": ("T5ForConditionalGeneration", lambda: t.T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100)),
    }[name]  # fmt: skip


@lru_cache
def huggingface(name: str) -> Subject:
    """An unmodified transformers model from its configuration."""
    transformers = pytest.importorskip("transformers")
    class_name, config = _config(name)

    def build(device: str) -> torch.nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            module = getattr(transformers, class_name)(config())
        if hasattr(module.config, "use_cache"):
            module.config.use_cache = False
        return module.train()

    def example(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        if name in ("swin", "vit"):
            side = 64 if name == "swin" else 32
            return (), {
                "pixel_values": torch.randn(3, 3, side, side, generator=generator).to(device)
            }
        ids = torch.randint(100, (3, 24), generator=generator).to(device)
        return (), {
            "input_ids": ids,
            **({"decoder_input_ids": ids.clone()} if name == "t5" else {}),
        }

    graph = ir.trace(build("meta"), *example("meta"), name=name)
    return Subject(name, graph, build, example)


def _subject(name: str) -> Subject:
    kind, _, rest = name.partition(":")
    return zoo(rest) if kind == "zoo" else huggingface(rest)


@pytest.fixture(scope="session")
def subject() -> Callable[[str], Subject]:
    """Give `zoo:<name>` or `hf:<name>`, traced once."""
    return _subject


SUBJECTS = [f"zoo:{name}" for name in ZOO] + [f"hf:{name}" for name in TRANSFORMERS]


@pytest.fixture(params=SUBJECTS)
def traced(request: pytest.FixtureRequest) -> Subject:
    """Every model of the zoo and of transformers, one after another."""
    return _subject(request.param)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
