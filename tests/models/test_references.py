"""`hf:` folders of transformers models and `module:factory`: traced, and their errors."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from toolkit import models
from toolkit.errors import FormatError, ToolkitError, UsageError

transformers = pytest.importorskip("transformers")

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
IMAGE = {"image_size": 32, "patch_size": 8, "num_labels": 5}
CONFIGS = {
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=48,
        bos_token_id=0, eos_token_id=0,
    ),
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(
        **SMALL, num_key_value_heads=2, vocab_size=64
    ),
    "Qwen2ForCausalLM": lambda: transformers.Qwen2Config(
        **SMALL, num_key_value_heads=2, vocab_size=64
    ),
    "SwinForImageClassification": lambda: transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
        window_size=4, num_labels=5,
    ),
    "ViTForImageClassification": lambda: transformers.ViTConfig(**SMALL, **IMAGE),
    "BertForMaskedLM": lambda: transformers.BertConfig(**SMALL, vocab_size=64),
    "BertForSequenceClassification": lambda: transformers.BertConfig(
        **SMALL, vocab_size=64, num_labels=5
    ),
    "BertForTokenClassification": lambda: transformers.BertConfig(
        **SMALL, vocab_size=64, num_labels=5
    ),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(
        num_layers=2, d_model=32, num_heads=4, d_ff=64, vocab_size=64
    ),
    "BertModel": lambda: transformers.BertConfig(**SMALL, vocab_size=64),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes a config.json, and nothing else, for an architecture."""

    def write(architecture):
        config = CONFIGS[architecture]()
        config.architectures = [architecture]
        config.save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_folder_with_only_a_config_is_traced_and_trains(folder, architecture):
    model = models.load(f"hf:{folder(architecture)}")
    sizes = {name: 2 if name == "batch" else 12 for name in model.sizes}
    module = model.build()
    assert type(module).__name__ == architecture
    assert type(module).__module__.startswith("transformers.")
    assert all(parameter.is_meta for parameter in module.parameters())
    args, kwargs = model.example(**sizes)
    exported = torch.export.export(module, args, kwargs, strict=False)
    assert len(exported.graph.nodes) > 30

    module = model.build("cpu", seed=1)
    args, kwargs = model.example(**sizes, device="cpu")
    output = module(*args, **kwargs)
    if architecture == "BertModel":
        assert "labels" not in kwargs
    else:
        output.loss.backward()
        assert output.loss.item() > 0
    assert "past_key_values" not in output
    same = model.build("cpu", seed=1)
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(module.parameters(), same.parameters(), strict=True)
    )


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_without_targets_there_are_logits_and_no_loss(folder, architecture):
    model = models.load(f"hf:{folder(architecture)}")
    args, kwargs = model.example(1, 6, device="cpu", targets=False)
    output = model.build("cpu")(*args, **kwargs)
    assert output.logits.shape == (1, 6, 64)
    assert "loss" not in output


def test_the_global_generator_is_left_alone(folder):
    model = models.load(f"hf:{folder('LlamaForCausalLM')}")
    before = torch.get_rng_state()
    model.build("cpu", seed=9)
    assert torch.equal(before, torch.get_rng_state())


def test_without_architectures_a_language_model_is_chosen(folder):
    at = folder("Qwen2ForCausalLM") / "config.json"
    config = json.loads(at.read_text())
    del config["architectures"]
    at.write_text(json.dumps(config))
    assert type(models.load(f"hf:{at.parent}").build()).__name__ == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("{", FormatError, "is corrupt"),
        ("[]", FormatError, "names no model_type"),
        ('{"model_type": "no-such-model"}', UsageError, "cannot read"),
        ('{"model_type": "vit", "architectures": ["Odd"]}', UsageError, "is a Odd, which none"),
        ('{"model_type": "wav2vec2"}', UsageError, "takes input_values"),
    ],
)
def test_bad_configs(tmp_path, text, kind, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(kind) as caught:
        models.load(f"hf:{tmp_path}")
    assert said in str(caught.value)


def test_missing_folders_and_files(tmp_path):
    with pytest.raises(UsageError, match=r"has no config\.json"):
        models.load(f"hf:{tmp_path}")
    with pytest.raises(UsageError, match="no such folder"):
        models.load(f"hf:{tmp_path / 'none'}")
    with pytest.raises(UsageError, match="for a transformers model: hf:"):
        models.load(str(tmp_path))


def test_a_hub_id_offline_is_one_clear_error(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ToolkitError) as caught:
        models.load("hf:no-one/nothing")
    assert "cannot get 'no-one/nothing' from the Hugging Face hub" in str(caught.value)
    assert "give a local folder" in str(caught.value)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel"])
def test_sizes_are_checked(folder, architecture):
    model = models.load(f"hf:{folder(architecture)}")
    assert dict(model.sizes) == {"batch": 1, "tokens": 48}
    with pytest.raises(UsageError, match="49 tokens do not fit"):
        model.example(1, 49)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes an importable module into the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text):
        (tmp_path / "mine.py").write_text("import torch\nfrom torch import nn\n" + text)
        sys.modules.pop("mine", None)

    yield write
    sys.modules.pop("mine", None)


WITH_EXAMPLE = """
def make(batch: int = 2, tokens: int = 5):
    "Two linear layers."
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), (torch.randn(batch, tokens, 3),), {}
"""


def test_a_factory(module):
    module(WITH_EXAMPLE)
    model = models.load("mine:make")
    assert dict(model.sizes) == {"batch": 2, "tokens": 5}
    assert model.summary == "Two linear layers."
    assert model.num_parameters == 21
    (values,), _ = model.example(tokens=7)
    assert values.is_meta
    assert values.shape == (2, 7, 3)
    before = torch.get_rng_state()
    first, second = (model.build("cpu", torch.float64, seed=4) for _ in range(2))
    assert torch.equal(first[0].weight, second[0].weight)
    assert first[0].weight.dtype == torch.float64
    (values,), _ = model.example(device="cpu", dtype=torch.float64)
    assert first(values).shape == (2, 5, 1)
    assert torch.equal(before, torch.get_rng_state())
    torch.export.export(model.build(), *model.example(), strict=False)


def test_a_class_that_needs_no_arguments_is_a_factory(module):
    module("class Net(nn.Linear):\n    def __init__(self): super().__init__(2, 2)\n")
    model = models.load("mine:Net")
    assert model.build().weight.is_meta
    with pytest.raises(UsageError, match="returns a module alone"):
        model.example()


@pytest.mark.parametrize(
    ("text", "ref", "said"),
    [
        ("", "nothing_here:make", "no module named 'nothing_here'"),
        ("", "mine.py:make", "is a path, not a module; write mine:make"),
        ("", "mine:", "does not name a model"),
        ("", "a b:c", "does not name a model"),
        ("def make(): pass", "mine:mak", "unknown factory in mine 'mak'; did you mean 'make'"),
        ("make = 3", "mine:make", "is a int, not something to call"),
        ("import nothing_here", "mine:make", "mine needs 'nothing_here'"),
        ("1 / 0", "mine:make", "importing mine raised ZeroDivisionError: division by zero"),
        ("def make(): return 3", "mine:make", "returned a int"),
        ("def make(): return nn.Linear(1, 1), [], {}", "mine:make", "returned a tuple"),
        ("def make(): raise ValueError('no')", "mine:make", "mine:make raised ValueError: no"),
        ("def make(size): return nn.Linear(size, 1)", "mine:make", "needs a value for 'size'"),
        ("def make(): return nn.Linear(1, 1, device='meta')", "mine:make", "on meta, and cpu"),
    ],
)
def test_factory_errors(module, text, ref, said):
    module(text)
    with pytest.raises(UsageError) as caught:
        models.load(ref).build("cpu")
    assert said in str(caught.value)


def test_only_the_zoo_has_numbers_to_change(module):
    module(WITH_EXAMPLE)
    with pytest.raises(UsageError, match="no zoo configuration to change"):
        models.load("mine:make", num_layers=3)
