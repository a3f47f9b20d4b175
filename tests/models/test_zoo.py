"""The zoo: published parameter counts, builds, seeds, examples, and what can be traced."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from toolkit import models
from toolkit.errors import UsageError
from toolkit.models import initialise, materialise
from toolkit.models.model import count_parameters

TINY = ("gpt-tiny", "llama-tiny", "swin-nano", "evoformer-tiny", "t5-tiny")

# Counted by their authors: safetensors totals of the hub, torchvision (Swin-T).
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "smollm2-135m": 134_515_008,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "swin-tiny": 28_288_354,
    "t5-small": 60_506_624,
}
# As rounded in the papers.
ROUNDED = {
    "gpt3-1.3b": (1.3e9, 0.02),
    "gpt3-2.7b": (2.7e9, 0.02),
    "gpt3-6.7b": (6.7e9, 0.01),
    "gpt3-15b": (15e9, 0.03),
    "gpt3-175b": (175e9, 0.01),
    "swin-large": (197e6, 0.01),
    "evoformer-87m": (87e6, 0.02),
    "evoformer-930m": (930e6, 0.01),
    "evoformer-2.4b": (2.4e9, 0.02),
    "evoformer-3.2b": (3.2e9, 0.02),
}


@pytest.mark.parametrize("name", models.names())
def test_builds_on_meta_with_the_parameters_it_says(name):
    model = models.load(name)
    module = model.build()
    assert all(parameter.is_meta for parameter in module.parameters())
    assert count_parameters(module) == model.num_parameters
    if name in PUBLISHED:
        assert model.num_parameters == PUBLISHED[name]
    if name in ROUNDED:
        count, tolerance = ROUNDED[name]
        assert model.num_parameters == pytest.approx(count, rel=tolerance)


def test_every_model_has_a_published_count_or_is_known_to_be_ours():
    others = set(models.names()) - set(PUBLISHED) - set(ROUNDED)
    ladders = {name for name in others if name.startswith(("swin-", "t5-big-"))} - {"swin-nano"}
    assert others - ladders == {*TINY, "gpt-mini"}
    for name in models.names():
        assert models.load(name).source, name


@pytest.mark.parametrize(
    ("name", "billions"),
    [("swin-1.8b", 1.79), ("swin-4.9b", 4.93), ("swin-10b", 10.4), ("swin-27b", 27.0)],
)
def test_swin_ladder_matches_the_artifact_which_leaves_out_the_position_tables(name, billions):
    named = models.load(name).build().named_parameters()
    counted = sum(each.numel() for path, each in named if "position_bias" not in path)
    assert float(f"{counted / 1e9:.3g}") == billions


@pytest.mark.parametrize(
    ("name", "billions"), [("4", 1.05), ("8", 3.15), ("16", 6.29), ("32", 12.6)]
)
def test_t5_embedding_matches_the_artifact(name, billions):
    embedding = models.load(f"t5-big-embedding-{name}").build().embedding
    assert float(f"{embedding.weight.numel() / 1e9:.3g}") == billions


@pytest.mark.parametrize("name", TINY)
def test_trains_on_cpu_and_a_seed_decides(name):
    model = models.load(name)
    args, kwargs = model.example(2, device="cpu", seed=3)
    before = torch.get_rng_state()
    losses = []
    for seed in (1, 1, 2):
        module = model.build("cpu", seed=seed)
        loss = module(*args, **kwargs)
        loss.backward()
        losses.append(loss.item())
        missing = [path for path, each in module.named_parameters() if each.grad is None]
        assert missing == []
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(before, torch.get_rng_state()), "a global generator was used"
    # Before training every answer is about as likely as any other.
    chance = {"gpt": 256, "llama": 512, "swin": 10, "t5": 1024}
    if model.family in chance:
        assert losses[2] == pytest.approx(math.log(chance[model.family]), rel=0.15)
    else:
        assert losses[2] == pytest.approx(2.0 * math.log(23) + 0.3 * math.log(64), rel=0.15)


@pytest.mark.parametrize("name", TINY)
def test_exports_on_meta(name):
    model = models.load(name)
    args, kwargs = model.example(2)
    exported = torch.export.export(model.build(), args, kwargs, strict=False)
    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    assert all(node.meta.get("nn_module_stack") for node in calls if "aten" in str(node.target))
    assert len(calls) > 50


@pytest.mark.parametrize("name", models.names())
def test_an_example_is_the_same_shape_on_every_device(name):
    model = models.load(name)
    small = {size: 1 if size != "tokens" else 8 for size in model.sizes}
    flat = [model.example(**small, device=device)[0] for device in ("meta", "cpu")]
    assert [each.shape for each in flat[0]] == [each.shape for each in flat[1]]
    assert [each.dtype for each in flat[0]] == [each.dtype for each in flat[1]]


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny"])
def test_a_stage_makes_its_own_part_of_the_whole(name):
    model = models.load(name)
    whole = model.build("cpu", seed=5)
    stage = nn.ModuleDict({"2": model.build().blocks[2]})
    initialise(materialise(stage, "cpu"), seed=5, prefix="blocks")
    for path, parameter in stage["2"].named_parameters():
        assert torch.equal(parameter, whole.blocks[2].get_parameter(path)), path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_parameters_stay_tied_when_given_memory(dtype):
    model = models.load("gpt2", num_layers=1, model_dim=48, vocab_size=64)
    for device in ("meta", "cpu"):
        module = model.build(device, dtype)
        assert module.head.weight is module.token_embedding.weight
        assert count_parameters(module) == model.num_parameters


def test_dtype_reaches_parameters_and_images():
    model = models.load("swin-nano")
    module = model.build("cpu", torch.bfloat16)
    args, kwargs = model.example(1, device="cpu", dtype=torch.bfloat16)
    assert module(*args, **kwargs).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny"])
def test_later_tokens_do_not_reach_earlier_ones(name):
    model = models.load(name)
    module = model.build("cpu")
    (ids,), _ = model.example(1, 12, device="cpu", targets=False)
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 100
    first, second = module(ids), module(changed)
    assert torch.equal(first[:, :7], second[:, :7])
    assert not torch.equal(first[:, 7:], second[:, 7:])


def test_numbers_can_be_changed_and_wrong_ones_are_named():
    assert models.load("llama3-70b", num_layers=1).num_parameters < 4e9
    with pytest.raises(UsageError, match=r"unknown number of gpt2 'layers'.*did you mean"):
        models.load("gpt2", layers=3)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"tokns": 3}, "unknown size of gpt-tiny 'tokns'; did you mean 'tokens'"),
        ({"tokens": 257}, "257 tokens do not fit"),
        ({"batch": 0}, "batch 0 is not a size"),
    ],
)
def test_wrong_sizes_are_errors(sizes, said):
    with pytest.raises(UsageError) as caught:
        models.load("gpt-tiny").example(**sizes)
    assert said in str(caught.value)


def test_a_swin_has_no_tokens():
    with pytest.raises(UsageError, match="unknown size of swin-tiny 'tokens'"):
        models.load("swin-tiny").example(1, 64)


def test_a_swin_whose_windows_do_not_tile_is_an_error():
    with pytest.raises(UsageError, match="windows of 7 do not tile the 40 x 40 patches of stage 0"):
        models.load("swin-tiny", image_side=160)
