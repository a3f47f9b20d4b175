from __future__ import annotations

import pytest
import torch

from toolkit import models
from toolkit.errors import UsageError
from toolkit.plan import chain, planner
from toolkit.plan.lower import compat, stages
from toolkit.plan.lower.compat import pipelines


def test_this_torch_offers_what_is_leaned_on() -> None:
    compat.self_test()
    pipelines.self_test()


@pytest.fixture(scope="module")
def tiny_batch():
    model = models.load("gpt-tiny")
    (ids, targets), _ = model.example(2, 16, "cpu")
    return model.build("cpu"), {"ids_BT": ids, "targets_BT": targets}


def test_stages_in_turn_are_the_whole_model(tiny_batch) -> None:
    module, batch = tiny_batch
    cuts = stages.cut(module, batch, [None, "blocks.1", "blocks.3"])
    assert [cut.user_inputs for cut in cuts] == [("ids_BT",), (), ("targets_BT",)]
    x = cuts[0].module(batch["ids_BT"])
    x = cuts[1].module(x)
    loss = cuts[2].module(x, targets_BT=batch["targets_BT"])
    torch.testing.assert_close(loss, module(**batch))


def test_every_parameter_is_in_one_stage_under_its_own_path(tiny_batch) -> None:
    module, batch = tiny_batch
    cuts = stages.cut(module, batch, [None, "blocks.2"])
    held = [name for cut in cuts for name, _ in cut.module.named_parameters()]
    assert sorted(held) == sorted(name for name, _ in module.named_parameters())
    assert cuts[1].module.get_parameter("head.weight") is module.get_parameter("head.weight")


def test_a_cut_that_is_not_there_is_an_error(tiny_batch) -> None:
    module, batch = tiny_batch
    with pytest.raises(UsageError, match=r"no operator of this model runs in 'blocks\.9'"):
        stages.cut(module, batch, [None, "blocks.9"])
    with pytest.raises(UsageError, match="follow the model's order"):
        stages.cut(module, batch, [None, "blocks.3", "blocks.1"])


def test_what_crosses_a_cut_is_what_was_predicted(tiny, tiny_batch, two_ranks) -> None:
    module, batch = tiny_batch
    plan = planner.make(tiny, two_ranks, "1f1b")
    begins_at = plan.stages[1].begins_at
    received = stages.cut(module, batch, [None, begins_at])[1].inputs
    predicted = chain.crossing(tiny.graph.at(batch=2, tokens=16), begins_at)
    assert [tuple(tensor.shape) for tensor in received] == [tensor.shape for tensor in predicted]
