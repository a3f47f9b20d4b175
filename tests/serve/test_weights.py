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
        ({"hidden_act": "gelu"}, UsageError, "gelu"),
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


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(64)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=r"architecture .* 'gemma3'"):
        weights.load(path)
