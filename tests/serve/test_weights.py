"""Wrong, torn and foreign files are named, with a remedy; nothing half-loaded gets through."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from toolkit.errors import FormatError, ToolkitError, UsageError
from toolkit.serve.model import weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        eos_token_id=[2, 7],
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def altered(tiny: Path, to: Path, **changes: object) -> Path:
    """Copy the folder with keys of config.json changed."""
    for file in tiny.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_bfloat16_weights_are_read_exactly(tiny: Path) -> None:
    model = weights.load(tiny)
    stored = load_file(tiny / "model.safetensors")
    for name, tensor in model.weights.items():
        assert tensor.dtype is torch.float32
        kept = stored["lm_head.weight" if name == "lm_head.weight" else f"model.{name}"]
        assert torch.equal(tensor, kept.float())
    assert model.eos_ids == {2, 7}


def test_shards_are_joined(tiny: Path, tmp_path: Path) -> None:
    folder = altered(tiny, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {name: file for file, held in halves.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert set(weights.load(folder).weights) == set(weights.load(tiny).weights)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "lama"}, UsageError, "did you mean 'llama'"),
        ({"model_type": "mamba"}, UsageError, "unknown architecture"),
        ({"hidden_act": "gelu"}, UsageError, "hidden_act to 'gelu'.* served is 'silu'"),
        ({"mlp_bias": True}, UsageError, "mlp_bias to True"),
        ({"partial_rotary_factor": 0.5}, UsageError, "partial_rotary_factor to 0.5"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            UsageError,
            "partial_rotary_factor to 0.5",
        ),
        ({"final_logit_softcapping": 30.0}, UsageError, "final_logit_softcapping to 30"),
        ({"layer_types": ["chunked_attention"]}, UsageError, "layer_types to 'chunked_attention'"),
        ({"tie_word_embeddings": True}, FormatError, "tie_word_embeddings to true"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, UsageError, "by gptq.*GGUF"),
        ({"quantization_config": {"load_in_4bit": True}}, UsageError, "load_in_4bit"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, UsageError, "compressed-"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, UsageError, "yarn"),
        ({"num_key_value_heads": 2}, FormatError, "k_proj.weight' is"),
        ({"num_hidden_layers": 2}, FormatError, r"no weight 'layers\.1\."),
        ({"attention_bias": True}, FormatError, "no weight"),
        ({"num_hidden_layers": 0}, FormatError, "no use for"),
    ],
)
def test_a_folder_that_is_not_what_it_says(
    tiny: Path, tmp_path: Path, changes: dict[str, object], error: type[ToolkitError], message: str
) -> None:
    with pytest.raises(error, match=message):
        weights.load(altered(tiny, tmp_path, **changes))


def test_fields_that_ask_for_nothing(tiny: Path, tmp_path: Path) -> None:
    neutral = {"partial_rotary_factor": 1.0, "mlp_bias": False, "quantization_config": None}
    folder = altered(tiny, tmp_path, **neutral, layer_types=["full_attention"])
    assert weights.load(folder).config == weights.load(tiny).config


def test_a_window_that_a_mistral_does_not_state(tiny: Path, tmp_path: Path) -> None:
    stated: dict[str, object] = {"model_type": "mistral", "max_position_embeddings": 32_768}
    assert weights.load(altered(tiny, tmp_path, **stated)).config.max_context == 4096
    folder = altered(tiny, tmp_path, **stated, sliding_window=None)
    assert weights.load(folder).config.max_context == 32_768


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_weights_of_a_type_that_is_not_read(tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = altered(tiny, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(UsageError, match=rf"{name}' as {dtype}.*unquantised weights"):
        weights.load(folder)


def test_torn_safetensors(tiny: Path, tmp_path: Path) -> None:
    folder = altered(tiny, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="not a readable safetensors"):
        weights.load(folder)
    path.unlink()
    with pytest.raises(FormatError, match="safetensors format"):
        weights.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match="corrupt"):
        weights.load(folder)


def test_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such model"):
        weights.load(tmp_path / "absent.gguf")


@pytest.mark.parametrize("keep", [4, 100, 4_000, 60_000_000])
def test_a_truncated_gguf(smollm2_gguf: Path, tmp_path: Path, keep: int) -> None:
    torn = tmp_path / "torn.gguf"
    with smollm2_gguf.open("rb") as whole:
        torn.write_bytes(whole.read(keep))
    with pytest.raises(FormatError, match="not a readable GGUF"):
        weights.load(torn)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    foreign = tmp_path / "model.gguf"
    foreign.write_bytes(np.random.default_rng(0).bytes(4096))
    with pytest.raises(FormatError, match="not a readable GGUF"):
        weights.load(foreign)


def write_gguf(path: Path, architecture: str, **numbers: float) -> Path:
    """A model without layers; `numbers` are named without the architecture."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    sizes = {"block_count": 0, "context_length": 64, "embedding_length": 8}
    for name, size in (sizes | {"feed_forward_length": 8, "attention.head_count": 2}).items():
        writer.add_uint32(f"{architecture}.{name}", size)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    for name, number in numbers.items():
        add = writer.add_uint32 if isinstance(number, int) else writer.add_float32
        add(f"{architecture}.{name}", number)  # type: ignore[arg-type]
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"architecture .* 'gemma3'"):
        weights.load(write_gguf(tmp_path / "other.gguf", "gemma3"))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"expert_count": 8}, "expert_count to 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping to 30"),
        ({"attention.scale": 0.25}, r"attention\.scale to 0\.25"),
        ({"rope.dimension_count": 2}, "rotates only part"),
    ],
)
def test_a_gguf_that_asks_for_more(tmp_path: Path, numbers: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        weights.load(write_gguf(tmp_path / "more.gguf", "llama", **numbers))


def test_rotary_stretching_of_a_gguf(tmp_path: Path) -> None:
    for name, divisors in (
        ("rope.scaling.factor", (4.0, 4.0)),
        ("rope.scale_linear", (4.0, 4.0)),
        ("rope.freq_base", None),
    ):
        path = write_gguf(tmp_path / "stretched.gguf", "llama", **{name: 4.0})
        assert weights.load(path).config.rope_divisors == divisors
