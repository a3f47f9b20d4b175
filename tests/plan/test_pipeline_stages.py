"""What a stage is made of: blocks that are run again, weights put off, parameters made in part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from toolkit import models
from toolkit.errors import UsageError
from toolkit.plan.lower import deferred, stages, weights

BLOCKS = ("blocks.0", "blocks.1", "blocks.2", "blocks.3")


@pytest.fixture
def tiny_batch():
    model = models.load("gpt-tiny")
    (ids, targets), _ = model.example(2, 16, "cpu")
    return model.build("cpu"), {"ids_BT": ids, "targets_BT": targets}


def backward(cuts, batch) -> tuple[Tensor, int]:
    """Run the stages one after another, and back; return the loss and how many activations
    autograd kept at the end of forward.
    """
    kept: set[int] = set()
    parameters = {value.data_ptr() for cut in cuts for value in cut.module.parameters()}

    def note(value: Tensor) -> Tensor:
        if value.data_ptr() not in parameters:
            kept.add(value.data_ptr())
        return value

    values: tuple[Tensor, ...] = ()
    with saved_tensors_hooks(note, lambda value: value):
        for cut in cuts:
            own = {name: batch[name] for name in cut.user_inputs}
            made = cut.module(*values, **own)
            values = (made,) if isinstance(made, Tensor) else made
    num_kept = len(kept)
    values[0].backward()
    return values[0].detach(), num_kept


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in module.named_parameters()}


def test_recomputed_blocks_keep_less_and_change_nothing(tiny_batch) -> None:
    module, batch = tiny_batch
    loss, all_kept = backward(stages.cut(module, batch, [None, "blocks.2"]), batch)
    want = gradients(module)
    module.zero_grad(set_to_none=True)
    some = stages.cut(module, batch, [None, "blocks.2"], ("blocks.1",))
    again, some_kept = backward(some, batch)
    assert torch.equal(again, loss)
    assert all(torch.equal(found, want[name]) for name, found in gradients(module).items())
    module.zero_grad(set_to_none=True)
    _, least_kept = backward(stages.cut(module, batch, [None, "blocks.2"], BLOCKS), batch)
    assert least_kept < some_kept < all_kept
    with pytest.raises(UsageError, match=r"no operator of this model runs in 'blocks\.9'"):
        stages.cut(module, batch, [None], ("blocks.9",))
    with pytest.raises(UsageError, match=r"blocks\.1 is to be recomputed as one"):
        stages.cut(module, batch, [None, "blocks.1.ffn"], ("blocks.1",))


@pytest.mark.parametrize("recompute", [(), BLOCKS])
def test_weights_put_off_are_the_same_afterwards(recompute, tiny_batch) -> None:
    module, batch = tiny_batch
    (whole,) = stages.cut(module, batch, [None], recompute)
    backward([whole], batch)
    want = gradients(module)
    module.zero_grad(set_to_none=True)
    (halves,) = stages.cut(module, batch, [None], recompute)
    put_off = deferred.defer(halves.module)
    backward([halves], batch)
    linears = {
        f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)
    }
    assert {name for name, found in gradients(module).items() if found is None} == linears
    put_off.take()()
    for name, found in gradients(module).items():
        torch.testing.assert_close(found, want[name])
    put_off.take()()  # nothing is owed twice
    for name, found in gradients(module).items():
        torch.testing.assert_close(found, want[name])


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny", "swin-nano", "t5-tiny"])
def test_a_rank_makes_its_own_parameters_as_the_whole_model_has_them(name: str) -> None:
    model = models.load(name)
    whole = dict(model.build("cpu", seed=3).named_parameters())
    module = model.build("meta", seed=3)
    args, kwargs = model.example(2, device="meta")
    batch = {**dict(zip(module.forward.__code__.co_varnames[1:], args, strict=False)), **kwargs}
    blocks = [path for path, part in module.named_modules() if path.endswith("blocks.1")]
    cuts = stages.cut(module, batch, [None, blocks[-1]])
    held = [cuts[1].module]
    made = dict(weights.make(module, held, torch.device("cpu"), 3).named_parameters())
    assert 0 < len(made) < len(whole)
    assert all(torch.equal(value, whole[path]) for path, value in made.items())
    assert {id(value) for value in held[0].parameters()} == {id(value) for value in made.values()}


def test_a_block_that_runs_twice_is_refused_with_what_to_use() -> None:
    model = models.load("evoformer-tiny")
    args, _ = model.example(1, device="meta")
    names = ("ids_BSR", "residues_BSR", "bins_BRR")
    batch = dict(zip(names, args, strict=True))
    with pytest.raises(UsageError, match=r"blocks\.1 runs more than once.*3f1b"):
        stages.cut(model.build("meta"), batch, [None, "blocks.1"])
