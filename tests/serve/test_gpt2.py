"""GPT-2 from either kind of file: transformers' tokens, and its own refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, GPT2Config

from toolkit.errors import FormatError, ToolkitError, UsageError
from toolkit.serve.assemble import EngineSettings, build
from toolkit.serve.model import weights
from toolkit.serve.model.grouped import Grouped, dense

sys.path.append(str(Path(__file__).parent))
from greedy import check, generate, greedy

PROMPTS = [[5, 17, 3, 88, 41, 2, 9, 60, 12, 33, 71], [1], [90, 4, 4, 18]]
SETTINGS = EngineSettings(kv_bytes=2**22, threads=1, step_tokens=9, max_batch=3, block_size=4)
LAYER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def random_gpt2(**changes: Any) -> Any:
    torch.manual_seed(7)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 48}
    model = AutoModelForCausalLM.from_config(
        GPT2Config(**(sizes | changes)), dtype=torch.float32, attn_implementation="eager"
    )
    for name, parameter in model.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpt2")
    random_gpt2().save_pretrained(made)
    return made


def write_gguf(model: Any, path: Path, kind: Kind) -> None:
    """Write it as llama.cpp's converter does: matrices `[out, in]`, vectors in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    for layer in range(config.n_layer):
        names |= {f"h.{layer}.{ours}": f"blk.{layer}.{its}" for ours, its in LAYER.items()}
    for name, tensor in model.transformer.state_dict().items():
        stem, _, what = name.rpartition(".")
        turned = tensor.T if ".c_" in name and what == "weight" else tensor
        values, held = turned.contiguous().numpy(), Kind.F32
        if tensor.ndim == 2 and stem != "wpe":
            values, held = gguf.quants.quantize(values, kind), kind
        writer.add_tensor(f"{names[stem]}.{what}", values, raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q5_0])
def test_from_gguf(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "gpt2.gguf"
    made = random_gpt2()
    write_gguf(made, path, kind)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=made.config, dtype=torch.float32
    ).eval()
    model = weights.load(path)
    kept = weights.load(path, keep_blocks=True).weights
    name = "layers.1.self_attn.k_proj.weight"
    assert isinstance(kept[name], Grouped) == (kind == Kind.Q8_0)
    assert (name in model.finer) == (kind != Kind.F32)
    for name, weight in model.weights.items():
        assert torch.equal(dense(kept[name]), dense(weight)), name
    engine, _ = build(model, SETTINGS)
    wanted = [greedy(theirs, ids, 20) for ids in PROMPTS]
    check(theirs, PROMPTS, generate(engine, PROMPTS, 20), wanted)


def test_the_context_ends_with_the_positions(folder: Path) -> None:
    model = weights.load(folder)
    engine, _ = build(model, SETTINGS)
    with pytest.raises(UsageError, match="48 tokens and the context is 48"):
        generate(engine, [[1] * 48], 1)
    assert len(generate(engine, [[1] * 40], 8)[0]) == 8
    with pytest.raises(UsageError, match="made for 48"):
        build(weights.load(folder), EngineSettings(max_context=64))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation_function": "relu"}, UsageError, "activation_function to 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, UsageError, "scale_attn_by_inverse_layer_idx"),
        ({"n_inner": 100}, FormatError, "up_proj.weight' is"),
        ({"n_positions": 64}, FormatError, "embed_positions.weight' is"),
        ({"tie_word_embeddings": False}, FormatError, "no weight 'lm_head.weight'"),
    ],
)
def test_a_folder_that_is_not_what_it_says(
    folder: Path,
    tmp_path: Path,
    changes: dict[str, object],
    error: type[ToolkitError],
    message: str,
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        weights.load(tmp_path)
